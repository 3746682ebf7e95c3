"""From text to batches: sources of documents, tokenizers, a cached corpus of token ids, and the order it is read in.

`documents` says what a source is; `python_docs`, `files` and `hub` are the kinds. `spool` keeps what a source gives on
disk and splits it, `tokenizers` and `pretrained` make ids of it, `corpus` puts both into the cache. `batches` cuts
token ids into windows and rows, `order` says which of them an optimizer step learns from. Nothing here knows a model.

What is done once for many runs lies beside these: `tokenizer_training`, `shards`, `analysis`, `download`; `tools` has
their commands.
"""
