"""An exported model through transformers' own Auto classes: the same ids of texts and chats, the same answers, stopped
at the same place."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tiny_checkpoints import TINY, random_variables  # noqa: E402

from deepseek_jax.data.tokenizers import ByteTokenizer, load_tokenizer  # noqa: E402
from deepseek_jax.generation import SamplingConfig, generate  # noqa: E402
from deepseek_jax.interop import export_folder  # noqa: E402
from deepseek_jax.interop.__main__ import main  # noqa: E402
from deepseek_jax.model.transformer import Transformer  # noqa: E402

CONFIG = TINY.replace(vocab_size=272, num_layers=1, first_k_dense=0, mtp_depth=0)
TEXTS = [
    "",
    "plain",
    "  two  spaces\n\ttab ",
    "naïve Größe",
    "Привет, мир",
    "你好，世界。",
    "नमस्ते",
    "สวัสดี",
    "🙂👩‍👩‍👧",
    "\x00\x7f\x80",
    "a" * 300,
]
CHAT = [
    {"role": "user", "content": "¿Qué? 你好"},
    {"role": "assistant", "content": "<think>hm</think><answer>4</answer>"},
    {"role": "user", "content": "why"},
]
NEW = 40


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(our variables, the folder) of a network whose end-of-text competes with the other tokens."""
    root, variables = tmp_path_factory.mktemp("export"), random_variables(CONFIG)
    variables["params"]["head"]["kernel"][:, ByteTokenizer().eos_id] *= 4
    export_folder(CONFIG, variables, root / "plain", dtype="float32")
    assert main(["import", str(root / "plain"), str(root / "stage")]) == 0
    (root / "stage" / "config.json").unlink()  # a stage that was trained here has none
    ByteTokenizer().save(root / "stage" / "tokenizer")
    assert main(["export", str(root / "stage"), str(root / "hf"), "--dtype=float32"]) == 0
    transformers.logging.set_verbosity_error()
    return variables, root / "hf"


def test_texts_and_chats_have_the_same_ids(exported):
    theirs, ours = transformers.AutoTokenizer.from_pretrained(exported[1]), ByteTokenizer()
    for text in TEXTS:
        ids = ours.encode(text)
        assert theirs(text, add_special_tokens=False)["input_ids"] == ids, text
        assert theirs.decode(ids, clean_up_tokenization_spaces=False) == text
    for prompt in (True, False):
        found = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=False)
        assert found == ours.chat(CHAT, add_generation_prompt=prompt)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (257, 258, 256)
    assert load_tokenizer(exported[1]).chat(CHAT) == ours.chat(CHAT)


def test_answers_are_the_same_and_stop_at_the_same_place(exported):
    variables, folder = exported
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert (model.generation_config.eos_token_id, model.generation_config.pad_token_id) == (258, 256)
    tokenizer = ByteTokenizer()
    prompts = np.array([tokenizer.chat([{"role": "user", "content": f"{i:03d}"}]) for i in range(24)], np.int32)
    sampling = SamplingConfig(max_new_tokens=NEW, temperature=0.0, eos_id=tokenizer.stop_ids, pad_id=tokenizer.pad_id)
    call = jax.jit(generate, static_argnames=("model", "sampling"))
    lengths = np.full(len(prompts), prompts.shape[1], np.int32)
    ours = np.asarray(call(Transformer(CONFIG), variables, prompts, lengths, jax.random.key(0), sampling).tokens_BN)
    ids = torch.from_numpy(prompts).long()
    theirs = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False)[
        :, prompts.shape[1] :
    ].numpy()
    stops = (ours == tokenizer.eos_id).argmax(axis=1)[(ours == tokenizer.eos_id).any(axis=1)]
    assert len(stops) > 3 and len(set(stops)) > 2  # answers that end, and not all at once
    np.testing.assert_array_equal(ours[:, : theirs.shape[1]], theirs)
    assert (ours[:, theirs.shape[1] :] == tokenizer.pad_id).all()
