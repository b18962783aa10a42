"""Files of weights: layouts, safetensors and .pdparams, loading, fingerprints."""
