"""To and from the layouts of `transformers`: the same weights under other names, so that models come and go.

Each module needs only the ones before it: `layouts` (config.json, and what a weight is called in either place),
`tokenizer_files`, `directory` (reading a folder), `export` and `model_card` (writing one). Weights are read from and
written to safetensors only; `transformers` itself is not needed.
"""
