"""Models seen from outside: data in, losses, predictions and checkpoints out; no `nn.Module`.

wrapper             what they have in common: training steps, checkpoints, a description
language_model      a decoder: continues texts
encoder_decoder     sources and targets, of token ids
encoder             a row of numbers for each sequence; `rows` pads sequences of different lengths
building            the one that a config asks for
mappings            batches as transformers has them: input_ids, labels, attention_mask
"""
