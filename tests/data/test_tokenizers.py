"""Both tokenizers: round trips, special tokens, chats, and decoding a stream."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizer_cases import DEEPSEEK, ROLES, TAGS, make_tokenizer

from deepseek_jax.data.config import SourceConfig
from deepseek_jax.data.documents import Tokenize
from deepseek_jax.data.tokenizers import ByteTokenizer, StreamDecoder, check_vocabulary, find_tokenizer, load_tokenizer
from deepseek_jax.errors import ConfigError, DataError

BOS, EOS, PAD, USER, ASSISTANT = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜▁pad▁｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
)
TEXT = "Größe 日本 🦙 def f(x):\n    return x + 1\t<think>ok</think>"
# In the manner of the released templates: a system prompt, roles, tools as JSON, and reasoning dropped from earlier
# answers.
TEMPLATE = """  {% set unused = 1 %}
{%- if not unused -%}never{%- endif %}
{% if unused %}{% endif %}
{%- if not messages -%}{{ raise_exception('no messages') }}{%- endif -%}
{{ bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'tool' %}{% continue %}{% endif %}
    {%- if message['role'] == 'system' %}{{ message['content'] | tojson }}{% endif %}
    {%- if message['role'] == 'user' %}{{ '<｜User｜>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' %}
        {{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"""
CHAT = [
    {"role": "system", "content": "Be <brief> & kind"},
    {"role": "user", "content": "hé?"},
    {"role": "tool", "content": "left out"},
    {"role": "assistant", "content": "<think>hm</think>yes"},
    {"role": "user", "content": "why?"},
]
RENDERED = f'{BOS}"Be <brief> & kind"{USER}hé?{ASSISTANT}yes{EOS}{USER}why?{ASSISTANT}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small byte-level BPE with added tokens as DeepSeek ships them: some marked special, roles and reasoning tags
    not."""
    path = tmp_path_factory.mktemp("tokenizer")
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet, special = tokenizers.pre_tokenizers.ByteLevel.alphabet(), [BOS, EOS, PAD]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    model.train_from_iterator([TEXT * 5, "return the function value again and again " * 9], trainer)
    model.add_tokens(
        [tokenizers.AddedToken(text, normalized=False) for text in (USER, ASSISTANT, "<think>", "</think>", "    ")]
    )
    model.save(str(path / "tokenizer.json"))
    bos_token = {"content": BOS, "__type": "AddedToken"}
    settings = {"bos_token": bos_token, "eos_token": EOS, "pad_token": PAD, "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module", params=["byte", "json"])
def tokenizer(request, folder):
    return load_tokenizer("byte" if request.param == "byte" else str(folder))


def test_round_trip_with_bos_and_eos(tokenizer):
    ids = tokenizer.encode(TEXT, bos=True, eos=True)
    assert ids[0] == tokenizer.bos_id and ids[-1] == tokenizer.eos_id and max(ids) < tokenizer.vocab_size
    assert tokenizer.decode(ids[1:-1]) == TEXT and tokenizer.decode(np.array(ids, np.int32), skip_special=True) == TEXT
    assert tokenizer.encode("lone \ud800 surrogate") == tokenizer.encode("lone ? surrogate")


def test_special_strings_are_text_unless_allowed(tokenizer):
    """A user who writes <think> or an end marker must not be able to steer the model with it."""
    for name, token_id in tokenizer.specials.items():
        assert token_id not in tokenizer.encode(f"a{name}b")
        assert tokenizer.decode(tokenizer.encode(f"a{name}b")) == f"a{name}b"
        assert tokenizer.encode(name, allow_special=True) == [token_id]
    think = tokenizer.specials["<think>"]
    assert tokenizer.decode([think, tokenizer.eos_id, tokenizer.pad_id], skip_special=True) == "<think>"


def test_byte_ids_are_fixed(byte_tokenizer):
    names = ["<pad>", "<bos>", "<eos>", "<think>", "</think>", "<answer>", "</answer>", "<user>", "<assistant>"]
    assert (
        byte_tokenizer.specials == {name: 256 + i for i, name in enumerate(names)} and byte_tokenizer.vocab_size == 272
    )
    assert (byte_tokenizer.pad_id, byte_tokenizer.bos_id, byte_tokenizer.eos_id) == (256, 257, 258)
    assert byte_tokenizer.encode("é", bos=True) == [257, 0xC3, 0xA9]
    assert byte_tokenizer.decode([0xC3, 258, 0xA9, 270, 999]) == "\ufffd<eos>\ufffd", (
        "ids without a meaning decode to nothing"
    )


def test_byte_chat(byte_tokenizer):
    chat = [{"role": "user", "content": "a<eos>"}, {"role": "assistant", "content": "<think>b</think>"}]
    expected = [257, 263, *b"a<eos>", 264]
    assert byte_tokenizer.chat(chat[:1]) == expected
    assert byte_tokenizer.chat(chat, add_generation_prompt=False) == expected + [259, ord("b"), 260, 258]
    marked = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<user><think>a<eos>"}]
    assert byte_tokenizer.turn(marked) == ([257, 263, ord("x"), 264], [*b"<user>", 259, *b"a<eos>", 258]), (
        "of an answer the tags alone are parsed"
    )
    with pytest.raises(DataError, match="no role 'system': .*allowed: assistant, user"):
        byte_tokenizer.chat([{"role": "system", "content": "x"}])


def test_ordinary_added_tokens_stay_in_use(folder):
    """Added tokens that are not written <…>, such as runs of spaces, are vocabulary and not control."""
    tokenizer = load_tokenizer(str(folder))
    assert "    " not in tokenizer.specials and {USER, BOS, "<think>"} <= set(tokenizer.specials)
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert next(token["id"] for token in added if token["content"] == "    ") in tokenizer.encode(TEXT)


def test_chat_template_as_stored(folder):
    tokenizer = load_tokenizer(str(folder / "tokenizer.json"))
    assert tokenizer.decode(tokenizer.chat(CHAT)) == RENDERED
    assert tokenizer.decode(tokenizer.chat(CHAT[:-1], add_generation_prompt=False)) == RENDERED.removesuffix(
        f"{USER}why?{ASSISTANT}"
    )
    with pytest.raises(DataError, match="refuses these messages: no messages"):
        tokenizer.chat([])


def test_chat_template_as_transformers_renders_it(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    ours = load_tokenizer(str(folder))
    for messages, prompt in ((CHAT, True), (CHAT[1:4], False), (CHAT[1:2], True)):
        expected = theirs.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=True, return_dict=False)
        assert ours.chat(messages, add_generation_prompt=prompt) == expected
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    assert ours.vocab_size == len(theirs)


def write_settings(folder, tmp_path, **changes):
    settings = json.loads((folder / "tokenizer_config.json").read_text()) | changes
    (tmp_path / "tokenizer.json").write_text((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({name: value for name, value in settings.items() if value is not None})
    )
    return str(tmp_path)


def test_template_in_its_own_file_or_by_name(folder, tmp_path):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    for changes in ({"chat_template": named}, {"chat_template": None}):
        path = write_settings(folder, tmp_path, **changes)
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
        tokenizer = load_tokenizer(path)
        assert tokenizer.decode(tokenizer.chat(CHAT)) == RENDERED


def test_no_template_is_guessed(folder, tmp_path):
    tokenizer = load_tokenizer(write_settings(folder, tmp_path, chat_template=None, pad_token=None))
    assert tokenizer.pad_id == tokenizer.eos_id
    with pytest.raises(ConfigError, match="has no chat template .* none is guessed"):
        tokenizer.chat(CHAT)


def test_template_runs_in_a_sandbox(folder, tmp_path):
    tokenizer = load_tokenizer(write_settings(folder, tmp_path, chat_template="{{ messages.append(1) }}"))
    with pytest.raises(DataError, match="refuses these messages.*unsafe"):
        tokenizer.chat(CHAT)
    with pytest.raises(DataError, match="does not compile"):
        load_tokenizer(write_settings(folder, tmp_path, chat_template="{% if %}"))


def test_unusable_tokenizers(folder, tmp_path):
    with pytest.raises(DataError, match="no tokenizer at 'bytes': give 'byte'"):
        load_tokenizer("bytes")
    with pytest.raises(DataError, match="no tokenizer at"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(DataError, match='names no eos_token: add "eos_token"'):
        load_tokenizer(write_settings(folder, tmp_path, eos_token=None))
    with pytest.raises(DataError, match="bos_token '<nope>' is not in the vocabulary"):
        load_tokenizer(write_settings(folder, tmp_path, bos_token="<nope>"))
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(DataError, match="not a tokenizer.json that the tokenizers library"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"model"')
    with pytest.raises(DataError, match="tokenizer.json is not valid JSON"):
        load_tokenizer(str(tmp_path))


def test_a_tokenizer_without_a_first_token(tmp_path):
    """As Qwen's: texts begin with their own first token."""
    transformers = pytest.importorskip("transformers")
    folder = make_tokenizer(tmp_path / "made", DEEPSEEK.replace("{{ bos_token }}", ""), ROLES, bos_token=None)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for ours in (load_tokenizer(folder), load_tokenizer(save(load_tokenizer(folder), tmp_path / "saved"))):
        assert ours.bos_id is theirs.bos_token_id is None
        ids = theirs.encode("the fox", add_special_tokens=False)
        assert ours.encode("the fox", bos=True, eos=True) == [*ids, theirs.eos_token_id]
        messages = [{"role": "user", "content": "the fox"}]
        expected = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
        assert ours.chat(messages) == expected
    document = Tokenize(SourceConfig("x.jsonl"), ours)({"text": "the fox"})
    assert document[:, 0].tolist() == [*ids, ours.eos_id] and document[:, 2].sum() == len("the fox")


def save(tokenizer, folder):
    tokenizer.save(folder)
    return folder


def test_vocabulary_must_fit_the_model(tokenizer):
    check_vocabulary(tokenizer, tokenizer.vocab_size)
    with pytest.raises(
        ConfigError,
        match=f"has {tokenizer.vocab_size} ids but the model's vocab_size is {tokenizer.vocab_size - 1}: set",
    ):
        check_vocabulary(tokenizer, tokenizer.vocab_size - 1)


def test_streamed_text_is_the_decoded_whole(tokenizer):
    rng = np.random.default_rng(0)
    # mostly invalid UTF-8, and specials
    noise = [int(i) for i in rng.integers(0, min(tokenizer.vocab_size, 300), size=400)]
    for ids in (tokenizer.encode(TEXT * 9, bos=True, eos=True), tokenizer.encode("\ufffd" * 30), noise):
        for step in (1, 2, 7):
            stream = StreamDecoder(tokenizer, skip_special=False)
            pieces = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
            assert "".join(pieces) + stream.flush() == tokenizer.decode(ids)


def test_stream_holds_back_unfinished_characters_only(byte_tokenizer):
    stream = StreamDecoder(byte_tokenizer)
    assert [stream.push([byte]) for byte in "a🦙b".encode()] == ["a", "", "", "", "🦙", "b"]
    assert [stream.push([byte]) for byte in (0xFF, 0xFF, 0xFF, 0xFF)] == ["", "", "", "\ufffd"], (
        "no more than three wait"
    )
    assert stream.flush() == "\ufffd" * 3
    assert stream.push(byte_tokenizer.encode("<think>x<eos>", allow_special=True)) == "<think>x"


@pytest.mark.parametrize("kind", ["byte_level", "prefix_space", "fallback"])
def test_streams_of_every_kind_of_tokenizer(tmp_path, kind):
    """Characters of several tokens, spaces at joins, hidden tokens between words, tokens that arrive together."""
    tokenizer = load_tokenizer(make_tokenizer(tmp_path, DEEPSEEK, ROLES + TAGS, kind=kind))
    texts = (
        "日本語 🦙🦙 Größe",
        " the quick<think> fox</think> jumps ",
        "x</s> y</s></s> z",
        "a\n\n b  c",
        "日本語" * 30,
    )
    assert len(tokenizer.encode(texts[0])) > len(texts[0]) + 10, "most characters are several tokens"
    for text in texts:
        ids = tokenizer.encode(text, allow_special=True)
        for skip in (True, False):
            for step in (1, 2, 3, 4, 7, len(ids)):
                stream = StreamDecoder(tokenizer, skip_special=skip)
                pieces = [stream.push(ids[i : i + step]) for i in range(0, len(ids), step)]
                assert not any("\ufffd" in piece for piece in pieces), "no half characters"
                assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip), "nothing waits for the end"
                assert stream.flush() == ""
    cut = tokenizer.encode("ab日")[:-1]
    stream = StreamDecoder(tokenizer)
    assert (stream.push(cut) + stream.flush()).rstrip("\ufffd").strip() == "ab"
    assert stream.push(tokenizer.encode("the")).strip() == "the", "after a flush it is as new"


def test_reasoning_tags_survive_decoding(tmp_path):
    """Also where the file marks them as special; what is hidden are the tokens of sequences, and padding."""
    tokenizer = load_tokenizer(
        make_tokenizer(tmp_path, DEEPSEEK, ROLES, lambda made: made.add_special_tokens([*TAGS, "<hidden>"]))
    )
    ids = tokenizer.encode("<s><think>a</think>b<hidden></s>", allow_special=True)
    assert tokenizer.decode(ids, skip_special=True) == "<think>a</think>b" and len(ids) == 7
    assert tokenizer.decode([-1, *ids, tokenizer.vocab_size, 2**40]) == "<s><think>a</think>b<hidden></s>"


def test_truncation_and_padding_of_the_file_never_apply(tmp_path):
    text = "the quick brown fox " * 30
    plain = load_tokenizer(make_tokenizer(tmp_path / "plain", DEEPSEEK, ROLES))
    for name, change in (
        ("cut", lambda made: made.enable_truncation(8)),
        ("left", lambda made: made.enable_truncation(8, direction="left", stride=2)),
        ("padded", lambda made: made.enable_padding(length=400, pad_id=1, pad_token="</s>")),
        ("multiple", lambda made: made.enable_padding(pad_to_multiple_of=64, pad_id=1, pad_token="</s>")),
    ):
        changed = load_tokenizer(make_tokenizer(tmp_path / name, DEEPSEEK, ROLES, change))
        for spoken in (text, "hi"):
            chat = [{"role": "user", "content": spoken}]
            assert changed.encode(spoken, eos=True) == plain.encode(spoken, eos=True) and changed.chat(
                chat
            ) == plain.chat(chat), name
            assert changed.chat([{"role": "user", "content": spoken + "</s>"}]) == plain.chat(
                [{"role": "user", "content": spoken + "</s>"}]
            )


def test_tokens_that_only_the_settings_know(tmp_path):
    """As transformers: added_tokens_decoder is added, or, in files of old, special_tokens_map.json names what the
    settings don't."""
    transformers = pytest.importorskip("transformers")
    listed = {
        "270": {"content": "<|new|>", "special": True},
        "271": {"content": " word", "special": False, "normalized": False},
    }
    first = make_tokenizer(tmp_path / "first", DEEPSEEK, ROLES, added_tokens_decoder=listed)
    second = make_tokenizer(tmp_path / "second", DEEPSEEK, ROLES, eos_token=None)
    (tmp_path / "second" / "special_tokens_map.json").write_text(
        json.dumps({"eos_token": {"content": "</s>"}, "pad_token": "<|user|>"})
    )
    third = make_tokenizer(tmp_path / "third", DEEPSEEK, ROLES, eos_token="x")  # a letter of the vocabulary
    # newer settings list the added tokens, and the map beside them is not asked
    fourth = make_tokenizer(tmp_path / "fourth", DEEPSEEK, ROLES, added_tokens_decoder=listed)
    (tmp_path / "fourth" / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|user|>"}))
    for folder in (first, second, third, fourth):
        ours, theirs = load_tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
        text = "a<|new|>b word fo x</s>"
        assert ours.encode(text, allow_special=True) == theirs.encode(text, add_special_tokens=False)
        assert (ours.bos_id, ours.eos_id, ours.vocab_size) == (theirs.bos_token_id, theirs.eos_token_id, len(theirs))
    assert (
        "<|new|>" in load_tokenizer(first).specials
        and load_tokenizer(second).pad_id == load_tokenizer(second).specials["<|user|>"]
    )


def test_saved_files_give_the_same_tokenizer(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    again = load_tokenizer(tmp_path / "tokenizer")
    assert (
        type(again) is type(tokenizer)
        and again.specials == tokenizer.specials
        and again.vocab_size == tokenizer.vocab_size
    )
    chat = [{"role": "user", "content": "hé<eos>"}, {"role": "assistant", "content": "<think>a</think>b"}]
    assert again.turn(chat) == tokenizer.turn(chat) and again.encode(TEXT) == tokenizer.encode(TEXT)
    assert (again.bos_id, again.eos_id, again.pad_id, again.stop_ids) == (
        tokenizer.bos_id,
        tokenizer.eos_id,
        tokenizer.pad_id,
        tokenizer.stop_ids,
    )
    again.save(tmp_path / "tokenizer")  # over itself
    assert load_tokenizer(tmp_path / "tokenizer").specials == tokenizer.specials
    assert not list(tmp_path.rglob("*.partial"))


def test_transformers_reads_the_saved_bytes(tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = ByteTokenizer()
    ours.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in (TEXT, "\x00\x7f \u00a0\u00ad\xff", "".join(map(chr, range(256)))):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text, allow_special=True)
        assert theirs.decode(ours.encode(text)) == text
    for ids in (list(range(265)), [0xC3, 258, 0xA9]):
        assert theirs.decode(ids) == ours.decode(ids)
    assert theirs.decode(list(range(265)), skip_special_tokens=True) == ours.decode(list(range(265)), skip_special=True)
    chat = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>b</think>"},
        {"role": "user", "content": "c"},
    ]
    for messages, prompt in ((chat, True), (chat[:2], False)):
        assert theirs.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False) == ours.chat(
            messages, add_generation_prompt=prompt
        )
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (257, 258, 256)
    config = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (257, 258, 256)


def test_where_a_checkpoint_has_its_tokenizer(folder, tmp_path):
    """A stage's folder, `checkpoints` in it or one step; an import's folder; a run's config.json for stages that have
    none."""
    stage = tmp_path / "run" / "sft"
    step = stage / "checkpoints" / "120"
    step.mkdir(parents=True)
    inside = (stage, stage / "checkpoints", step)
    for path in (*inside, tmp_path):
        with pytest.raises(DataError, match="no tokenizer at .*say which the model was trained with.*--tokenizer="):
            load_tokenizer(path)
    config = tmp_path / "run" / "config.json"
    config.write_text(json.dumps({"stages": ["sft"], "tokenizer": str(folder)}))
    for path in (*inside, tmp_path / "run"):
        assert load_tokenizer(path).encode(TEXT) == load_tokenizer(folder).encode(TEXT)
    for named in ({}, {"tokenizer": None}, {"tokenizer": "byte"}):
        config.write_text(json.dumps({"stages": ["sft"]} | named))
        assert find_tokenizer(step) == "byte" and isinstance(load_tokenizer(stage), ByteTokenizer)
    config.write_text(json.dumps({"stages": ["sft"], "tokenizer": str(tmp_path / "run")}))
    with pytest.raises(DataError, match="which names none"):
        load_tokenizer(stage)
    load_tokenizer(folder).save(stage / "tokenizer")
    assert all(load_tokenizer(path).encode(TEXT) == load_tokenizer(folder).encode(TEXT) for path in inside), (
        "its own goes first"
    )
    config.write_text(json.dumps({"model_type": "deepseek_v3"}))
    with pytest.raises(DataError, match="no tokenizer at"):
        find_tokenizer(tmp_path / "run")
    with pytest.raises(DataError, match="the folder does not exist"):
        find_tokenizer(tmp_path / "gone")


@pytest.mark.parametrize(
    "file, content, message",
    [
        ("tokenizer_config.json", "[]", "tokenizer_config.json holds list, not a JSON object"),
        ("tokenizer_config.json", b"\xff{}", "tokenizer_config.json is not valid JSON: byte 0 is not UTF-8"),
        ("tokenizer_config.json", {"bos_token": 5}, "bos_token=5: must be a token's text"),
        ("tokenizer_config.json", {"eos_token": {"text": "</s>"}}, "eos_token={'text': '</s>'}: must be"),
        ("tokenizer_config.json", {"chat_template": 5}, "chat_template holds int, not a template's text"),
        ("tokenizer_config.json", {"chat_template": [{"template": "x"}]}, "needs objects with `name` and `template`"),
        ("tokenizer_config.json", {"chat_template": []}, "none named 'default'"),
        (
            "tokenizer_config.json",
            {"added_tokens_decoder": {"x": {"content": "<a>"}}},
            "added_tokens_decoder: invalid literal",
        ),
        ("tokenizer_config.json", {"added_tokens_decoder": {"9": 3}}, "must be an object of objects"),
        ("generation_config.json", "nonsense", "generation_config.json is not valid JSON"),
        ("chat_template.jinja", b"\xff", "chat_template.jinja is not UTF-8 text"),
        ("chat_template.jinja", "{% for %}", "chat_template.jinja does not compile"),
        ("config.json", "{" * 9, "config.json is not valid JSON"),
    ],
)
def test_damaged_files_are_named(tmp_path, file, content, message):
    make_tokenizer(tmp_path, DEEPSEEK, ROLES)
    load_tokenizer(tmp_path)
    if isinstance(content, dict):
        content = json.dumps(json.loads((tmp_path / file).read_text()) | content)
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        load_tokenizer(tmp_path)
