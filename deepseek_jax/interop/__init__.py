"""Hugging Face checkpoints of the DeepSeek families, in and out.

`python -m deepseek_jax.interop import|export|inspect`; from Python: `import_folder`, `export_folder`, `open_folder`.
"""

from deepseek_jax.interop.exporter import export_folder
from deepseek_jax.interop.folder import Folder, open_folder, precision_for
from deepseek_jax.interop.hf_config import config_from_hf, config_to_hf
from deepseek_jax.interop.importer import import_folder

__all__ = ["Folder", "config_from_hf", "config_to_hf", "export_folder", "import_folder", "open_folder", "precision_for"]
