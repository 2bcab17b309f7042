"""Small tokenizers with the chat templates of the families, for tests of text, data and generation."""

import json
from pathlib import Path

import tokenizers

WORDS = "the quick brown fox jumps over the lazy dog again and again "

DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' "
    "%}<|user|>{{ m.content }}"
    "{% else %}<|assistant|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}{% if add_generation_prompt "
    "%}<|assistant|>{% endif %}"
)
R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}"
    "{% else %}<|assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
CHATML = """{%- for message in messages %}
    {%- if loop.first and message.role != 'system' %}
        {{- '<|im_start|>system\nYou help.<|im_end|>\n' }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
LLAMA = """{% set loop_messages = messages %}{% for message in loop_messages %}
{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim
    + '<|eot_id|>' %}
{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
{{- content }}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""
LAST = (  # writes an end between turns only
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if not loop.last %}{{ eos_token }}{% "
    "endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ eos_token }}<|assistant|>{% endif %}"
)
ROLES, TAGS = ("<|user|>", "<|assistant|>"), ("<think>", "</think>")
FAMILIES = {
    "deepseek": (DEEPSEEK, ROLES + TAGS),
    "r1": (R1, ROLES + TAGS),
    "chatml": (CHATML, ("<|im_start|>", "<|im_end|>", *TAGS)),
    "llama": (LLAMA, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "last": (LAST, ROLES),
}


def make_tokenizer(
    folder: Path, template: str | None, extra=(), change=lambda made: None, kind="byte_level", **settings
) -> str:
    """A folder with a small BPE; `extra` are added tokens that the file does not mark as special.

    Kinds: "byte_level" as DeepSeek's; "prefix_space", which begins texts with a space; "fallback", in SentencePiece's
    manner, with ▁ for spaces and single bytes for characters it doesn't know.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = ["<s>", "</s>"]
    if kind == "fallback":
        letters = {
            letter: 258 + i for i, letter in enumerate(sorted(set(WORDS + "ABC:\n.!?'0123456789") - {" "}) + ["▁"])
        }
        vocab = {"<s>": 0, "</s>": 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)} | letters
        made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, [], byte_fallback=True, fuse_unk=False))
        made.normalizer = tokenizers.normalizers.Sequence(
            [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
        )
        steps = (
            tokenizers.decoders.Replace("▁", " "),
            tokenizers.decoders.ByteFallback(),
            tokenizers.decoders.Fuse(),
            tokenizers.decoders.Strip(" ", 1, 0),
        )
        made.decoder = tokenizers.decoders.Sequence(list(steps))
        made.add_special_tokens(special)
    else:
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix_space")
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=300, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        )
        made.train_from_iterator([WORDS * 9], trainer)
    made.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in extra])
    change(made)
    made.save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"} | ({} if template is None else {"chat_template": template})
    (folder / "tokenizer_config.json").write_text(json.dumps(named | settings))
    return str(folder)
