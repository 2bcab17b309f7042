"""Damaged tokenizer files and chat templates: each is used or refused by a UserError, never anything else. 10,000 of
each with `-m fuzz`."""

import json

import pytest
import tokenizers
from damage import COUNTS, damaged_text, tried
from tokenizer_cases import FAMILIES, make_tokenizer

from deepseek_jax.data.tokenizers import StreamDecoder, load_tokenizer

VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 258, 10**10, 2**64, 0.5, float("nan"), "", "a", "</s>", "<|user|>", "<think>",
    "\ud800", "\ufdd0", [], {}, [1], [[]], {"a": 1}, {"content": "<s>"}, {"type": "Sequence"}, "BPE", "WordLevel",
    "Unigram", "ByteLevel", "Metaspace", "{{ messages }}", "(", "[",
    {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False}, {"type": "ByteFallback"},
    {"type": "Lowercase"},
    {"type": "Replace", "pattern": {"String": "a"}, "content": "</s>"}, {"type": "WordPiece", "prefix": "##",
    "cleanup": True}, {"type": "NFKC"},
]  # fmt: skip
PIECES = [
    "{%", "%}", "{{", "}}", "{#", "-", "for", "in", "if", "else", "endif", "endfor", "messages", "message", "m.content",
    "loop.last", "|", "| trim", "| tojson", "| first", ".split('</think>')", "[-1]", "[", "]", "(", ")", "'", '"', "\n",
    "set x = ", "~", "+", "*", "**", "% 3", "999999999", "range(99999)", "namespace(a=1)", "raise_exception('no')",
    "macro f(x)", "endmacro", "{% generation %}", "{% " "endgeneration %}", "strftime_now('%q')", "bos_token",
    "is defined", "not", "none", "{% break %}", "recursive", "loop(m)", "self", "caller()", "{% include " "'x' %}",
    "{% extends x %}", "{% raw %}", "{% for i in range(99999) %}", "{% call f(1) %}", "cycler(1)", "lipsum(9999)",
    "| indent(999999999)", "| center(10**10)", "\ufdd0", ".format(1)", "'{:>9999999999}'", "| replace('', 'a' * 999)",
    "| list", "| join('a' * 999)", "__class__",
]  # fmt: skip
CHAT = [
    {"role": "user", "content": "a</s>b"}, {"role": "assistant", "content": "<think>é</think> c"},
    {"role": "user", "content": "日"},
]  # fmt: skip


def use(tokenizer):
    for text in ("the fox </s> 日", "<think><|user|>", ""):
        ids = tokenizer.encode(text, bos=True, eos=True)
        tokenizer.decode(tokenizer.encode(text, allow_special=True), skip_special=True)
        stream = StreamDecoder(tokenizer)
        assert all(isinstance(piece, str) for piece in (stream.push(ids), stream.flush()))
        assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert all(isinstance(i, int) for i in tokenizer.stop_ids)


@pytest.fixture
def files(tmp_path):
    """Contents of the files of tokenizers, small ones, by the kind of tokenizer and the name of the file."""
    made = {}
    for kind in ("byte_level", "fallback"):
        folder = tmp_path / kind
        make_tokenizer(folder, *FAMILIES["r1"], kind=kind)
        definition = json.loads((folder / "tokenizer.json").read_text())
        keep = 40 if kind == "byte_level" else 400
        definition["model"]["vocab"] = dict(
            sorted(definition["model"]["vocab"].items(), key=lambda entry: entry[1])[:keep]
        )
        definition["model"]["merges"] = []
        made[kind] = {
            "tokenizer.json": definition,
            "tokenizer_config.json": json.loads((folder / "tokenizer_config.json").read_text())
            | {
                "added_tokens_decoder": {
                    "0": {"content": "<s>", "special": True},
                    "400": {"content": "<new>", "lstrip": True, "special": False},
                }
            },
            "special_tokens_map.json": {"pad_token": "</s>", "eos_token": {"content": "</s>", "lstrip": False}},
            "added_tokens.json": {"<more>": 500, "<most>": 501},
            "generation_config.json": {"eos_token_id": [1, 70], "bos_token_id": 0},
            "config.json": {"eos_token_id": 1, "model_type": "deepseek_v3"},
        }
    tokenizers.Tokenizer.from_str(json.dumps(made["byte_level"]["tokenizer.json"]))
    return made


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_tokenizer_files(files, tmp_path, count):
    target = tmp_path / "damaged"
    target.mkdir()

    def attempt(rng):
        contents = files[rng.choice(["byte_level", "byte_level", "byte_level", "fallback"])]
        spoiled = rng.choice([*contents, "tokenizer.json", "tokenizer.json", "tokenizer_config.json"])
        for name, content in contents.items():
            raw = json.dumps(content).encode() if name != spoiled else damaged_text(rng, content, VALUES)
            (target / name).write_bytes(raw)
        if spoiled not in ("tokenizer.json", "tokenizer_config.json"):
            settings = contents["tokenizer_config.json"] | {"added_tokens_decoder": None}
            (target / "tokenizer_config.json").write_text(
                json.dumps({name: value for name, value in settings.items() if value is not None})
            )
        tokenizer = load_tokenizer(target)
        use(tokenizer)
        tokenizer.chat(CHAT)
        tokenizer.turn(CHAT[:2])

    tried(count, attempt)


def damaged_template(rng, template):
    """The template with pieces of others put in its text, in its expressions or anywhere, or with parts taken out."""
    for _ in range(rng.randint(1, 2)):
        piece = rng.choice(
            [rng.choice(PIECES), rng.choice(PIECES) + " " + rng.choice(PIECES), chr(rng.randrange(1, 0x3000)), ""]
        )
        written = rng.choice([piece, "{{ " + piece + " }}", "{% " + piece + " %}", "{{ m.content" + piece + " }}"])
        places = [i for i in range(len(template) + 1) if template.startswith(("{{", "{%"), i) or i == len(template)]
        start = rng.choice([rng.choice(places), rng.randrange(len(template) + 1)])
        end = min(len(template), start + rng.choice([0, 0, 0, 1, 2, 20]))
        template = template[:start] + written + template[end:]
    return template


@pytest.mark.parametrize("count", COUNTS)
def test_damaged_templates(files, tmp_path, count):
    for name, content in files["byte_level"].items():
        (tmp_path / name).write_text(json.dumps(content))

    def attempt(rng):
        template, _ = FAMILIES[rng.choice(list(FAMILIES))]
        (tmp_path / "chat_template.jinja").write_text(damaged_template(rng, template), encoding="utf-8")
        tokenizer = load_tokenizer(tmp_path)
        tokenizer.chat(CHAT)
        tokenizer.chat(CHAT[:2], add_generation_prompt=False)
        tokenizer.turn(CHAT[:2])

    tried(count, attempt)
