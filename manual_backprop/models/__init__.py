"""Networks with one interface (`network`): three implementations of the same network, and what is built on them.

    custom              gradients by hand; `step` is the machinery around the calculus of its training step, `recorder`
                        copies intermediate tensors
    mirror              the same lines with gradients by autograd; `mirror_step` is the machinery around them
    baseline            idiomatic PyTorch, built from `baseline_modules`; `autograd` is what it shares with the mirror
    implementations     all three by name
    decoding/           text token by token, with a key-value cache: greedy, sampling, beam search
    wrappers/           a model's outer interface: losses, training steps, generation, checkpoints
    training_step       the optimizer that a run's config asks for, and one step of it
    flops               floating-point operations of a token
    huggingface/        the same weights under the names of `transformers`

Not here: what is learned (`tasks`), and models in files (`trained_models`). Importing this room imports no torch.
May import: checkpoints and below.
"""
