"""From text to batches: documents, tokenizers, a cached corpus of token ids, and the order in which it is read.

Each module needs only the ones before it: `documents` (text and its split), `tokenizers`, `corpus` (both, on disk),
`batches` (token ids as the network wants them). Nothing here knows a model.
"""
