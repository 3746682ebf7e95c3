"""The outer interface of models: data in; losses, predictions and checkpoints out. None is an `nn.Module`.

wrapper             what they share: training steps, checkpoints, a description
language_model      a decoder that continues texts
encoder_decoder     sources and targets, both token ids
encoder             a row of numbers for each sequence; `rows` pads sequences of different lengths
building            the one that a config asks for
mappings            batches as transformers has them: input_ids, labels, attention_mask
"""
