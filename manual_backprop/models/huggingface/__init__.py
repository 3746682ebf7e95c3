"""The same network under the names of Hugging Face `transformers`: config.json, and names and shapes of weights.

No number is changed on the way. Not here: folders, tokenizers and exports (`trained_models`).
"""
