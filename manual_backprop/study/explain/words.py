"""What a page about one step says in words; numbers and code come from the step itself (`page.py`)."""

from __future__ import annotations

from collections.abc import Mapping

# A section is one pair that the network calls: (the pair, the first parameter that it uses, without its block).
SECTIONS: dict[tuple[str, str], tuple[str, str, str]] = {  # -> title, going forward, going backward
    ("token_embedding", "token_embedding.weight"): (
        "Tokens become vectors",
        "Each token looks up its row of the table. Equal tokens get equal rows.",
        "Every place says how its row should change, and the row gets the sum: {repeated}. The rows of words that were "
        "not read get 0 here.",
    ),
    ("learned_positions", "position_embedding.weight"): (
        "Vectors learn their place",
        "Without this line the network could not tell the first `{repeated_word}` from the second.",
        "A sum hands its gradient to each of its terms unchanged: the same numbers go into the table of places and on "
        "to the token.",
    ),
    ("sinusoidal_positions", ""): (
        "Vectors learn their place",
        "A fixed pattern is added for each place, so that the network can tell the first `{repeated_word}` from the "
        "second.",
        "The pattern is constant: the gradient passes through unchanged, and nothing is collected.",
    ),
    ("linear", "attention.query.weight"): (
        "Query, key and value",
        "One matrix product makes all three, side by side, for both heads.",
        "Each factor of a product gets the upstream gradient times the other factor, summed over what it meets.",
    ),
    ("self_attention", ""): (
        "Attention",
        "Each place asks (query) all places up to its own (key), and takes the mean of their values, weighted by the "
        "answers.",
        "Still only products and a softmax, read from the last line to the first. A masked score had probability 0, "
        "which multiplies its gradient to 0. And the first place sees only itself: its probability is 1 whatever its "
        "score, so its scores, and with them its query, get no gradient at all.",
    ),
    ("rotary_attention", ""): (
        "Attention that knows distances",
        "Queries and keys are turned, each pair of numbers by an angle that grows with the place, so that the score of "
        "a query and a key depends on how far apart they are. Both queries then read the one key and value.",
        "Products and a softmax, read from the last line to the first; the key and the value were read twice and get "
        "the sum of two gradients; and what was turned is turned back.",
    ),
    ("linear", "attention.output.weight"): (
        "The heads are mixed",
        "A matrix product lets what the two heads found meet.",
        "The rule of every matrix product.",
    ),
    ("feed_forward", "feed_forward.hidden.weight"): (
        "The feed-forward network",
        "Every place by itself: a matrix product, a curve, a matrix product.",
        "Two matrix products and, between them, the slope of the curve at every element.",
    ),
    ("gated_feed_forward", "feed_forward.gate.weight"): (
        "The feed-forward network",
        "Every place by itself: one matrix product makes a gate and a hidden layer, side by side; their product goes "
        "through another matrix.",
        "Two matrix products and, between them, the rule for a product: each of the two factors gets the upstream "
        "gradient times the other one, and the gate its slope besides.",
    ),
    ("residual_rms_norm", "final_norm.weight"): (
        "The last sum and norm",
        "What the feed-forward network found is added to what it read, and the sum is scaled to length 1 (the root of "
        "its mean square).",
        "The norm removed one direction of each row, its length. Moving along it changes nothing behind the norm, so "
        "the gradient loses its part along it. Nothing else reads this sum.",
    ),
    ("residual_layer_norm", "final_norm.weight"): (
        "The last sum and norm",
        "What the feed-forward network found is added to what it read, and the sum is normalized.",
        "The norm removed two directions of each row: its mean (all elements up) and its length (all elements further "
        "from the mean). Moving along these changes nothing behind the norm, so the gradient loses its part along "
        "both. Nothing else reads this sum, so all that reaches it comes through the norm.",
    ),
    ("linear_cross_entropy", "token_embedding.weight"): (
        "Logits and loss",
        "A score for every word of the vocabulary, made with the embedding table itself (the head is *tied* to it), "
        "and the surprise at the word that really follows.",
        "Here it starts. The gradient of the scores is the probabilities, less 1 at the word that really followed, "
        "divided by the number of targets: every row sums to 0. And the embedding table gets the first of its two "
        "contributions.",
    ),
    ("linear_cross_entropy", "head.weight"): (
        "Logits and loss",
        "A score for every word of the vocabulary, and the surprise at the word that really follows.",
        "Here it starts. The gradient of the scores is the probabilities, less 1 at the word that really followed, "
        "divided by the number of targets: every row sums to 0.",
    ),
}

# The norms stand at different places.
NORMS: dict[tuple[str, str], tuple[str, str, str]] = {
    ("gpt2", "attention_norm.weight"): (
        "The norm before the attention",
        "Each row is moved to mean 0 and scaled to variance 1, then to a gain and a bias that are learned. There is no "
        "branch to be added yet.",
        "Two gradients meet: what comes through the norm (`dsum`), and what comes past it along the sum (`dtotal`).",
    ),
    ("gpt2", "feed_forward_norm.weight"): (
        "Sum and norm before the feed-forward network",
        "What the attention found is added to what it read, and the sum is normalized.",
        "Two gradients meet: what comes through the norm (`dsum`), and what comes past it along the sum (`dtotal`). "
        "The sum hands theirs to both of its terms alike. This path past everything is why deep residual networks "
        "learn: `+` makes no gradient smaller.",
    ),
    ("llama", "attention_norm.weight"): (
        "The norm before the attention",
        "Each row is scaled to mean square 1, then by a gain that is learned; it is not moved as in layer norm. There "
        "is no branch to be added yet.",
        "Two gradients meet: what comes through the norm (`dsum`), and what comes past it along the sum (`dtotal`).",
    ),
    ("llama", "feed_forward_norm.weight"): (
        "Sum and norm before the feed-forward network",
        "What the attention found is added to what it read, and the sum is normalized.",
        "Two gradients meet: what comes through the norm (`dsum`), and what comes past it along the sum (`dtotal`). "
        "The sum hands theirs to both of its terms alike.",
    ),
    ("vaswani", "attention_norm.weight"): (
        "Sum and norm after the attention",
        "What the attention found is added to what it read, and the sum is normalized.",
        "As before. The sum hands its gradient to both of its terms: past the attention, and into it.",
    ),
    ("vaswani", "feed_forward_norm.weight"): (
        "Sum and norm after the feed-forward network",
        "What the feed-forward network found is added to what it read, and the sum is normalized.",
        "The norm removed two directions of each row: its mean (all elements up) and its length (all elements further "
        "from the mean). Moving along these changes nothing behind the norm, so the gradient loses its part along "
        "both. The sum hands what is left to both of its terms: past the feed-forward network, and into it.",
    ),
}


# With an encoder and a decoder: (the stack, the pair, the parameter).
IN_PAIRS: dict[tuple[str, str, str], tuple[str, str, str]] = {
    ("encoder.", "token_embedding", "token_embedding.weight"): (
        "Tokens become vectors",
        "Each token of the source looks up its row of the table, which the target will share.",
        "Every place says how its row should change, and the row gets the sum: {repeated}. They are added to what the "
        "head and the target have collected.",
    ),
    ("decoder.", "token_embedding", "token_embedding.weight"): (
        "Tokens become vectors",
        "The target's tokens look up their rows of the same table. It is the true target, one place later: `begin` "
        "stands before it, so that the first symbol can be said.",
        "Every place says how its row should change, and the row gets the sum: {repeated}.",
    ),
    ("encoder.", "self_attention", ""): (
        "Attention of the source with itself",
        "Each place asks (query) all places (key), later ones too: the source is known as a whole. It takes the mean "
        "of their values, weighted by the answers.",
        "Only products and a softmax, read from the last line to the first.",
    ),
    ("encoder.", "rotary_attention", ""): (
        "Attention of the source with itself",
        "Queries and keys are turned, each pair of numbers by an angle that grows with the place. Each place asks all "
        "places, later ones too: the source is known as a whole. Both queries read the one key and value.",
        "Products and a softmax, read from the last line to the first; the key and the value were read twice and get "
        "the sum of two gradients; and what was turned is turned back.",
    ),
    ("decoder.", "linear", "cross_attention.query.weight"): (
        "The query for the source",
        "What the target's places ask: a matrix product for both heads.",
        "The rule of every matrix product.",
    ),
    ("decoder.", "linear", "cross_attention.key.weight"): (
        "Keys and values of the memory",
        "What the encoder has made of the source, the memory, is read here: one product makes a key and a value for "
        "each of its places.",
        "The rule of every matrix product. Its `dx` is the gradient of the memory: what the encoder should have made "
        "otherwise. Every block of a decoder reads the memory, so it collects from all of them; here there is one.",
    ),
    ("decoder.", "attention", ""): (
        "Attention of the target with the source",
        "Each place of the target asks all places of the source, and takes the mean of their values. A row of "
        "probabilities for each place of the target, a column for each of the source: after training, reversal shows "
        "here as a line from corner to corner.",
        "The same products and the same softmax as in every attention; but query on one side, key and value on the "
        "other now part: the gradient of the query goes on into the decoder, those of key and value into the encoder.",
    ),
    ("decoder.", "linear", "cross_attention.output.weight"): (
        "The heads are mixed again",
        "A matrix product lets what the two heads found in the source meet.",
        "The rule of every matrix product.",
    ),
    ("decoder.", "linear_cross_entropy", "token_embedding.weight"): (
        "Logits and loss",
        "A score for every word of the vocabulary, made with the embedding table itself (the head is *tied* to it), "
        "and the surprise at the word that really follows; at the last place that is `end`.",
        "Here it starts. The gradient of the scores is the probabilities, less 1 at the word that really followed, "
        "divided by the number of targets: every row sums to 0. And the embedding table gets the first of its three "
        "contributions.",
    ),
}
_BEFORE_CROSS = "What the attention found in the target is added to what it read, and the sum is normalized."
_AFTER_CROSS = "What the attention found in the source is added to what it read, and the sum is normalized."
CROSS_NORMS: dict[tuple[bool, str], tuple[str, str, str]] = {  # pre-norm or not, and where
    (True, "cross_attention_norm.weight"): (
        "Sum and norm before the look at the source",
        _BEFORE_CROSS,
        "Two gradients meet: what comes through the norm (`dsum`), and what comes past it along the sum (`dtotal`).",
    ),
    (True, "feed_forward_norm.weight"): (
        "Sum and norm before the feed-forward network",
        _AFTER_CROSS,
        "Two gradients meet: what comes through the norm (`dsum`), and what comes past it along the sum (`dtotal`).",
    ),
    (False, "cross_attention_norm.weight"): (
        "Sum and norm after the look at the source",
        _AFTER_CROSS,
        "As before. The sum hands its gradient to both of its terms: past the attention, and into it.",
    ),
}


def words_of(architecture: str, pair: str, parameter: str) -> tuple[str, str, str]:
    """Title, what happens forward, what happens backward."""
    if pair.startswith("residual_") and (architecture, parameter) in NORMS:
        return NORMS[architecture, parameter]
    return SECTIONS[pair, parameter]


def words_in_pairs(architecture: str, pair: str, parameter: str, stack: str) -> tuple[str, str, str]:
    """Likewise, in one of two stacks, which the title names."""
    pre_norm = architecture != "vaswani"
    if stack == "decoder." and pair.startswith("residual_") and (pre_norm, parameter) in CROSS_NORMS:
        found = CROSS_NORMS[pre_norm, parameter]
    else:
        found = IN_PAIRS.get((stack, pair, parameter)) or words_of(architecture, pair, parameter)
    title, forward, backward = found
    return f"{stack.rstrip('.').capitalize()}: {title[0].lower()}{title[1:]}", forward, backward


ARCHITECTURES = {
    "gpt2": "pre-norm, learned positions, GELU (tanh), a head that is tied to the embedding, as in GPT-2",
    "llama": "pre-norm with RMS norms, rotary positions, a key and a value for both queries, SwiGLU, no biases, a head "
    "of its own, as in LLaMA",
    "vaswani": "post-norm, sinusoidal positions, ReLU, a head of its own, as in the first transformer",
}

HOW_TO_READ = """\
**How to read it.** Each section is one call that the network makes, first forward (1 to {last}), then backward
({last} to 1); *Backward 3* sends the gradient through what *Forward 3* computed. The code is indented where one
function calls another, and below each line stand the numbers that it made: a row for each word that was read,
the heads side by side. The gradient of `x` is called `dx` and has its shape. Parameters are whole tenths, so
the decimal they are printed with is all there is. Weights of matrix products are stored as (outputs, inputs)
and printed transposed: a column for each output, above the output's own column.

Beside every gradient stands autograd's number for it: the same forward code has been run again with PyTorch
recording, and asked for the gradient at this very line. "within 1e-16" is the largest difference, over all
elements; float64 numbers near 1 are 2e-16 apart.
"""

INTRODUCTION = (
    """\
# One step of backpropagation, number by number

This page is written by `{command}`. It runs one training step of the hand-written network and takes down what
every line of the code makes. Nothing here is typed in or computed a second time: the code is the code that
trains, the numbers are its numbers, and a test fails when this page and the code part.

**The task.** The text is `{text}`. The network reads `{tokens}` and learns to say what comes next at each
place:

| place | it has read | it should say |
|---|---|---|
{task}

`{repeated_word}` is read twice and should be followed by another word each time, so the network has to look at
what came before. The vocabulary: {vocabulary}.

**The network.** One transformer block, so small that its {count} parameters can be printed: {architecture}.

| B | T | D | H | K | F | V | N |
|---|---|---|---|---|---|---|---|
{sizes}

"""
    + HOW_TO_READ
)

INTRODUCTION_OF_PAIRS = (
    """\
# One step of an encoder-decoder, number by number

This page is written by `{command}`. It runs one training step of the hand-written network and takes down what
every line of the code makes. Nothing here is typed in or computed a second time: the code is the code that
trains, the numbers are its numbers, and a test fails when this page and the code part.

**The task.** The source is `{source}`, and the target is the same backwards. The encoder reads the source. The decoder
reads `{tokens}`, looks at the source from each place, and learns to say `{targets}`
(teacher forcing: it reads what it should have said before):

| place | the decoder has read | it should say |
|---|---|---|
{task}

`{repeated_word}` is read twice and should be followed by another word each time, so the network has to know where in
the source it is. The vocabulary: {vocabulary}.

**The network.** One block in the encoder and one in the decoder, so small that its {count} parameters can be printed:
{architecture}.

| B | S | T | D | H | K | F | V | N |
|---|---|---|---|---|---|---|---|---|
{sizes}

"""
    + HOW_TO_READ
)

PARAMETERS = """\
## The parameters' gradients

Each gradient was added (`+=`) into its buffer. Its length is the root of its sum of squares. A third opinion
comes without any calculus: the largest element of each is compared with the *nudged* loss, computed forward
only, $(L(w + h) - L(w - h)) / 2h$ with $h = 10^{-6}$.
"""

ZERO_BY_STRUCTURE = """\
**The key bias has no gradient**, and not by accident: it adds the same number, query · bias, to every score of
a row, and softmax does not see what is added to a whole row. What is printed as its gradient is rounding.
"""

NO_BIASES = """\
**There are no biases**: neither in the matrix products nor in the norms.
"""

TIED = """\
**The embedding table was used twice**, to read words and to score them, so its gradient has two parts. `dweight
+=` has added them up; no line of code knows that the matrices are one.
"""

TIED_IN_PAIRS = """\
**The embedding table was used three times**, to read the source, to read the target and to score words, so its gradient
has three parts. `dweight +=` has added them up; no line of code knows that the matrices are one.
"""

UPDATE = """\
## The update

Every parameter takes a small step against its gradient. This is all that "learning" is:
"""

OUTCOME = """\
The same words once more, with the new parameters:
"""

PROMISE = """\
The loss fell from **{before}** to **{after}**, by {fell}. The gradient promises learning rate × |gradient|² =
{learning_rate} × {square} = {promised} along a straight line, and the loss is curved. A step ten times shorter
(learning rate {small_rate}) hardly sees the curve: {small_promised} is promised, and the loss falls by
{small_fell}.
"""


def filled(text: str, facts: Mapping[str, str]) -> str:
    """With each {name} in it replaced by its fact."""
    for name, fact in facts.items():
        text = text.replace("{" + name + "}", fact)
    return text
