"""Networks behind one seam (`network`): three levels of the same thing, and what is made of them.

    custom              gradients by hand; `step` is what its training step has around the calculus, `recorder` what
                        it shows of its inside
    mirror              the same lines with gradients by autograd; `mirror_step` is what it has around them
    baseline            what one would write in PyTorch; `autograd` is common to it and the mirror
    implementations     all three by name
    decoding            one token after the other, with keys and values kept
    generation          from logits to tokens: the likeliest, drawn ones, beam search
    wrapper             what every model has from outside: training steps, checkpoints, a description
    language_model      a decoder seen from outside: losses and generation of a language model
    optimization        the optimizer that a run's config asks for
    flops               operations of a token
    huggingface/        the same weights under the names of `transformers`

Not here: what is learned (`tasks`), and models in files (`trained_models`). Importing this room imports no torch.
May import: checkpoints and below.
"""
