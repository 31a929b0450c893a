"""apot_fx: any PyTorch model to Additive-Powers-of-Two integers, with proof that nothing was lost.

>>> import torch, apot_fx
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
>>> x = torch.randn(32, 8)
>>> prepared = apot_fx.prepare_apot(model.eval(), "w4a4")
>>> apot_fx.calibrate(prepared, [x])
>>> converted = apot_fx.convert_apot(prepared)
>>> apot_fx.check_parity(prepared, converted, [x]).ok
True
"""

from .api import *  # noqa: F403 - api.__all__ is the list of public names
from .api import __all__ as __all__
