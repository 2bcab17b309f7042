"""Checks of data before the first step of the first stage: sources are opened and samples of them tokenized."""

from collections.abc import Sequence

from deepseek_jax.data.config import SourceConfig
from deepseek_jax.data.documents import Documents, Tokenize
from deepseek_jax.data.sources import NothingHeldOut, is_own, open_source, own_function
from deepseek_jax.data.tokenizers import Tokenizer


def check_sources(
    sources: Sequence[SourceConfig],
    splits: Sequence[str],
    tokenizer: Tokenizer,
    data_dir: str | None = None,
    vocab_size: int | None = None,
    *,
    prepare: bool = True,
) -> None:
    """Opens the sources and tokenizes one record of each shape (see `Documents`), through the chat template too.

    A source that holds nothing out has no validation split to open; where it is trained on, its share of held-out
    documents may be empty. Without `prepare` only local files are opened: a TFDS dataset may have to be
    downloaded, and a user's own function is imported, not called.
    Raises DataError for what is missing, unreadable or empty, and for a record that cannot be tokenized.
    """
    opened = []  # until the end, so that a file of both splits is read once
    for source in sources:
        if not prepare and (source.name == "stdlib" or source.name.startswith("tfds:")):
            continue
        if not prepare and is_own(source):
            own_function(source)
            continue
        for split in splits:
            if split == "train" or source.holds_out:
                try:
                    records = open_source(source, split, data_dir, vocab_size=vocab_size)
                except NothingHeldOut:
                    if "train" not in splits:
                        raise
                    continue
                opened.append(Documents(records, Tokenize(source, tokenizer, vocab_size)))
                opened[-1][0]
