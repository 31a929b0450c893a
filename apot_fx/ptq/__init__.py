"""Post-training methods: what improves a prepared model without training it."""
