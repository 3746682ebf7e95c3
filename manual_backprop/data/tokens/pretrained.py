"""Pretrained tokenizers: from a folder of `transformers` or `tokenizers`, or from the hub."""

from contextlib import suppress
from pathlib import Path

from ...common.errors import InputError
from ...common.uris import expanded
from ...config.schema import TokenizerConfig, option_values
from ..sources.hub import hub_file
from .tokenizer import FILE_NAME, SETTINGS_FILE, BpeTokenizer, ByteTokenizer, Tokenizer, load_tokenizer

WITHOUT_HUB = (
    "Go online once, or use tokenizer=bpe, which is learned from your text, or tokenizer=file tokenizer.path=FOLDER "
    "with a tokenizer that you have."
)


def pretrained_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer of tokenizer=file, or of one with a `repository`. Raises InputError."""
    if config.repository is not None:
        with suppress(InputError):  # this file is optional; the next one is not
            hub_file(config.repository, SETTINGS_FILE, config.revision, WITHOUT_HUB)
        return load_tokenizer(hub_file(config.repository, FILE_NAME, config.revision, WITHOUT_HUB).parent)
    if config.path is None:
        raise InputError("tokenizer=file needs a path: give the folder of a tokenizer as tokenizer.path=FOLDER.")
    return tokenizer_of_folder(config.path)


def tokenizer_of_folder(path: str | Path) -> Tokenizer:
    """The tokenizer in a folder with tokenizer.json (from this project, `tokenizers` or `transformers`) or with GPT-2's
    two files; or that of the file tokenizer.json itself. Raises InputError."""
    folder = expanded(path)
    if folder.is_file() and folder.name == FILE_NAME:
        folder = folder.parent
    if not folder.is_dir():
        raise InputError(f"tokenizer.path={path}: there is no such folder. Give one that holds {FILE_NAME}.")
    if (folder / FILE_NAME).exists():
        return load_tokenizer(folder)
    if (folder / "vocab.json").exists() and (folder / "merges.txt").exists():
        settings = folder / SETTINGS_FILE
        return BpeTokenizer(_gpt2_files(folder), settings.read_text(encoding="utf-8") if settings.is_file() else None)
    found = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
    raise InputError(f"tokenizer.path={path}: expected {FILE_NAME} there, but found {found}.")


def _gpt2_files(folder: Path) -> str:
    """The content of tokenizer.json for vocab.json and merges.txt."""
    import tokenizers

    try:
        model = tokenizers.models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
    except Exception as error:  # the library raises nothing more precise
        raise InputError(f"vocab.json and merges.txt in {folder} are not a tokenizer: {error}") from error
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    end = "<|endoftext|>"
    if tokenizer.token_to_id(end) is not None:
        tokenizer.add_special_tokens([end])
    return str(tokenizer.to_str())


def tokenizer_named(name: str | Path) -> Tokenizer:
    """The tokenizer of one name: byte, gpt2, OWNER/NAME on the hub, a folder, or a name in outputs/tokenizers. Raises
    InputError."""
    given = str(name)
    places = [expanded(given), Path("outputs/tokenizers") / given]
    if (place := next((place for place in places if place.exists()), None)) is not None:
        return tokenizer_of_folder(place)
    if given == ByteTokenizer.name:
        return ByteTokenizer()
    if given in ("bpe", "char"):
        raise InputError(f"{given} is learned from a text: give the folder of a trained tokenizer, or byte or gpt2.")
    if given == "gpt2":
        shipped = option_values("tokenizer", given)
        return pretrained_tokenizer(
            TokenizerConfig(given, repository=shipped["repository"], revision=shipped["revision"])
        )
    if given.count("/") == 1 and not given.startswith((".", "/", "~")):
        return pretrained_tokenizer(TokenizerConfig("gpt2", repository=given))
    raise InputError(
        f"{given}: there is no such tokenizer. Give a folder that holds {FILE_NAME}, the name of one in "
        "outputs/tokenizers, byte, gpt2, or OWNER/NAME on the hub."
    )
