"""From text to batches: sources (TFDS without TensorFlow, local files, in-memory documents), tokenizers, packing, the Grain loader."""

from deepseek_jax.data.config import DataConfig, SourceConfig
from deepseek_jax.data.documents import completion_documents
from deepseek_jax.data.loader import Loader, build_loader
from deepseek_jax.data.tokenizers import StreamDecoder, Tokenizer, check_vocabulary, load_tokenizer

__all__ = [
    "DataConfig",
    "Loader",
    "SourceConfig",
    "StreamDecoder",
    "Tokenizer",
    "build_loader",
    "check_vocabulary",
    "completion_documents",
    "load_tokenizer",
]
