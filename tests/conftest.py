"""Settings of every test run."""

import os

# Before torch is imported: OpenMP threads that spin while they wait make small tensors on a busy
# machine several times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
