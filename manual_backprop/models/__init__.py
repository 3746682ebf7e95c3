"""Networks behind one seam (`network`): three levels of the same thing, and what is made of them.

    custom              gradients by hand; `step` is what its training step has around the calculus, `recorder` what
                        it shows of its inside
    mirror              the same lines with gradients by autograd; `mirror_step` is what it has around them
    baseline            what one would write in PyTorch, of `baseline_modules`; `autograd` is common to it and the
                        mirror
    implementations     all three by name
    decoding/           one token after the other: greedy, drawn, beam search, with keys and values kept
    wrappers/           models seen from outside: losses, training steps, generation, checkpoints
    training_step       the optimizer that a run's config asks for, and one step of it
    flops               operations of a token
    huggingface/        the same weights under the names of `transformers`

Not here: what is learned (`tasks`), and models in files (`trained_models`). Importing this room imports no torch.
May import: checkpoints and below.
"""
