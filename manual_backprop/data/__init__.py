"""From text to batches: sources of documents, tokenizers, a cached corpus of token ids, and the order it is read in.

`documents` says what a source is; `python_docs`, `files` and `hub` are the kinds. `reading` puts what a source gives
into a file, a `spool`, and splits it; `tokenizers` and `pretrained` make ids of it, `run_tokenizer` says which one a
config means. `corpus` is the training and validation tokens of a run, kept in a `token_cache`; `held_out` those of a
test split. `batches` cuts token ids into windows and rows, `order` says which of them an optimizer step learns from.
Nothing here knows a model.

What is done once for many runs lies beside these: `tokenizer_training`, `shards` (which `token_shards` reads),
`analysis`, `download`; `tools` has their commands.
"""
