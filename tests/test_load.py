"""Checkpoints: random weights by seed, saving and loading, the pad token, the tokens that stop."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from stages.data.batching import pad
from stages.data.chat import encode, encode_prompt
from stages.errors import InputError
from stages.models.load import (
    LoadedModel,
    LoadedPolicy,
    is_classifier,
    load_policy,
    require_same_tokens,
    save_checkpoint,
    save_policy,
)
from stages.models.logprobs import TokenLogProbs
from stages.objectives.likelihood import nll_loss

MESSAGES = [{"role": "user", "content": "12+3-9"}]


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def weights(policy: LoadedPolicy) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])


@torch.no_grad()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model.eval()(torch.tensor([ids])).logits


@pytest.fixture
def checkpoint(init_folder: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    save_policy(load_policy(init_folder, seed=3), folder)
    return folder


def rewrite(folder: Path, file: str, **fields: Any) -> None:
    """Change fields of a JSON file; None removes one."""
    content = json.loads((folder / file).read_text()) | fields
    (folder / file).write_text(json.dumps({name: value for name, value in content.items() if value is not None}))


def test_random_weights_are_decided_by_the_seed_alone(init_folder: Path) -> None:
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = load_policy(init_folder, seed=7)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    again, other = load_policy(init_folder, seed=7), load_policy(init_folder, seed=8)
    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_a_checkpoint_gives_the_same_logits_after_loading(init_folder: Path, tmp_path: Path) -> None:
    policy = load_policy(init_folder, seed=3)
    ids = encode_prompt(policy.tokenizer, MESSAGES)
    expected = logits(policy.model, ids)
    save_policy(policy, tmp_path / "checkpoint")
    loaded = load_policy(tmp_path / "checkpoint", seed=99)
    assert torch.equal(logits(loaded.model, ids), expected)
    assert (loaded.stops, loaded.pad_id, loaded.context) == (policy.stops, policy.pad_id, policy.context)


def test_a_checkpoint_loads_with_plain_transformers(init_folder: Path, checkpoint: Path) -> None:
    policy = load_policy(init_folder, seed=3)
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=False)
    assert ids == encode_prompt(policy.tokenizer, MESSAGES)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(checkpoint), ids), logits(policy.model, ids))
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_the_same_weights_give_the_same_bytes(init_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    save_policy(load_policy(init_folder, seed=3), tmp_path / "again")
    save_policy(load_policy(checkpoint), tmp_path / "loaded")
    assert set(bytes_of(checkpoint)) >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert bytes_of(tmp_path / "again") == bytes_of(checkpoint)
    assert bytes_of(tmp_path / "loaded") == bytes_of(checkpoint)


def test_a_checkpoint_holds_no_path(checkpoint: Path, tmp_path: Path) -> None:
    save_policy(load_policy(checkpoint), tmp_path / "loaded")
    for folder in (checkpoint, tmp_path / "loaded"):
        for name, content in bytes_of(folder).items():
            assert str(tmp_path).encode() not in content, name
        config = json.loads((folder / "config.json").read_text())
        assert not any(isinstance(value, str) and "/" in value for value in config.values())


def test_a_checkpoint_is_written_with_the_cache_on(checkpoint: Path, tmp_path: Path) -> None:
    policy = load_policy(checkpoint)
    policy.model.config.use_cache = False  # as gradient checkpointing leaves it
    save_checkpoint(policy.model, policy.tokenizer, tmp_path / "saved")
    assert bytes_of(tmp_path / "saved") == bytes_of(checkpoint)


def test_what_a_loaded_model_knows(checkpoint: Path) -> None:
    policy = load_policy(checkpoint)
    assert isinstance(policy, LoadedModel)
    assert (policy.pad_id, policy.stops, policy.context) == (0, (2,), 128)
    unbounded: Any = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=None))
    assert LoadedModel(unbounded, policy.tokenizer, policy.stops).context == 2**31


@pytest.mark.parametrize("files", [[], ["notes.txt"]])
def test_a_folder_without_a_model_is_refused(tmp_path: Path, files: list[str]) -> None:
    for name in files:
        (tmp_path / name).write_text("x")
    with pytest.raises(InputError, match=r"no model there .*found " + (files[0] if files else "nothing")):
        load_policy(tmp_path)


@pytest.mark.parametrize("names", [["LlamaForSequenceClassification"], ["Other", "GPT2ForSequenceClassification"]])
def test_a_reward_model_is_not_a_language_model(checkpoint: Path, names: list[str]) -> None:
    assert not is_classifier(checkpoint)
    rewrite(checkpoint, "config.json", architectures=names)
    assert is_classifier(checkpoint)
    with pytest.raises(InputError, match=r"checkpoint: a reward model .* where a language model is needed"):
        load_policy(checkpoint)


@pytest.mark.parametrize("names", [None, [], ["LlamaForCausalLM"], ["ForSequenceClassificationHead"]])
def test_a_folder_is_a_classifiers_only_if_its_config_says_so(checkpoint: Path, names: list[str] | None) -> None:
    rewrite(checkpoint, "config.json", architectures=names)
    assert not is_classifier(checkpoint)
    assert load_policy(checkpoint).stops == (2,)


def test_folders_without_a_config_hold_no_classifier(init_folder: Path, tmp_path: Path) -> None:
    assert not is_classifier(init_folder)
    assert not is_classifier(tmp_path)


def test_an_init_file_without_a_model_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "init.yaml").write_text("tokenizer: {task: chain-sum, chat_template: x}\nmodel: {hidden_size: 16}\n")
    with pytest.raises(InputError, match="model_type"):
        load_policy(tmp_path)


def test_several_eos_ids_of_the_generation_config_all_stop(checkpoint: Path, tmp_path: Path) -> None:
    eos = load_policy(checkpoint).stops[0]
    rewrite(checkpoint, "generation_config.json", eos_token_id=[11, eos, 12])
    policy = load_policy(checkpoint)
    assert policy.stops == (eos, 11, 12)
    save_policy(policy, tmp_path / "saved")
    assert load_policy(tmp_path / "saved").stops == (eos, 11, 12)


def likelihood(policy: LoadedPolicy) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """The completion's log-probs, the gradient on the embedding's first 134 rows, and the encoding, of a two-turn chat."""
    prompt = [*MESSAGES, {"role": "assistant", "content": "<answer>6</answer>"}, {"role": "user", "content": "1+1+1"}]
    encoded = encode(policy.tokenizer, prompt, "<answer>3</answer>", policy.stops)
    ids = [*encoded.prompt_ids, *encoded.completion_ids]
    # A shorter sequence beside it, so that there is padding.
    batch = pad([np.array(ids), np.array(ids[:9])], [len(encoded.prompt_ids), 5], policy.pad_id, (0, 1))
    logp_BT = TokenLogProbs(policy.model)(batch)
    nll_loss(logp_BT, batch.target_BT).backward()
    embeddings: Any = policy.model.get_input_embeddings()
    return logp_BT.detach(), embeddings.weight.grad[:134], ids


def test_pad_equal_to_eos_in_the_source_changes_nothing(checkpoint: Path) -> None:
    expected = likelihood(load_policy(checkpoint))
    eos = load_policy(checkpoint).stops[0]
    rewrite(checkpoint, "tokenizer_config.json", pad_token="<eos>")
    rewrite(checkpoint, "config.json", pad_token_id=eos)
    rewrite(checkpoint, "generation_config.json", pad_token_id=eos)
    source: Any = AutoTokenizer.from_pretrained(checkpoint)
    assert source.pad_token_id == source.eos_token_id == eos

    policy = load_policy(checkpoint)
    assert policy.pad_id != eos
    assert policy.model.config.pad_token_id == policy.pad_id
    logp_BT, gradient, ids = likelihood(policy)
    assert ids == expected[2]
    assert ids.count(eos) == 2
    assert torch.equal(logp_BT, expected[0])
    # The EOS learns as it did: an embedding whose padding is the EOS would leave its row out.
    torch.testing.assert_close(gradient, expected[1], atol=1e-7, rtol=1e-5)
    assert gradient[eos].abs().max() > 0


def without_unknown(folder: Path) -> None:
    """Put a tokenizer of 134 words without an unknown token, and with pad == eos, in the folder's place."""
    vocabulary = {"<bos>": 0, "<eos>": 1, **{f"w{i}": i for i in range(2, 134)}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w2"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    marks: dict[str, Any] = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<eos>"}
    PreTrainedTokenizerFast(tokenizer_object=core, **marks).save_pretrained(folder)
    for file in ("config.json", "generation_config.json"):
        rewrite(folder, file, bos_token_id=0, eos_token_id=1, pad_token_id=1)


@pytest.mark.parametrize("shift", [0.0, 10.0])
def test_a_new_pad_token_takes_next_to_nothing_from_the_others(checkpoint: Path, tmp_path: Path, shift: float) -> None:
    without_unknown(checkpoint)
    plain: Any = AutoModelForCausalLM.from_pretrained(checkpoint, tie_word_embeddings=False)
    # The same vector on every row moves all logits of a position alike, far below 0 as GPT-2's are, or far above: a new row
    # that does not move with them would win every draw.
    with torch.no_grad():
        plain.lm_head.weight.copy_(plain.get_input_embeddings().weight + shift)
    plain.save_pretrained(checkpoint)
    ids = list(range(2, 60))
    with torch.no_grad():
        before = logits(plain, ids).log_softmax(-1)[0]

    torch.manual_seed(0)
    policy = load_policy(checkpoint)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    again = load_policy(checkpoint)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(weights(policy), weights(again))
    assert (policy.pad_id, policy.stops) == (134, (1,))
    assert policy.tokenizer("w5 w6")["input_ids"] == [5, 6]
    after = logits(policy.model, ids).log_softmax(-1)[0]
    drop = before - after[:, :134]
    assert float(drop.max()) <= math.log1p(1 / 134) + 1e-5
    assert float(drop.min()) >= -1e-5
    save_policy(policy, tmp_path / "saved")
    saved = load_policy(tmp_path / "saved")
    assert saved.pad_id == 134
    assert torch.equal(logits(saved.model, ids), logits(policy.model, ids))


# Models that read each other's tokens.


def test_models_must_read_the_tokens_that_the_policy_writes(init_folder: Path, checkpoint: Path, tmp_path: Path) -> None:
    policy, same = load_policy(init_folder), load_policy(checkpoint)
    other = LoadedModel(same.model, load_policy(checkpoint).tokenizer, same.stops)
    other.tokenizer.add_tokens(["<new>"])
    require_same_tokens(policy)
    require_same_tokens(policy, reward_model=same, reference=policy)
    with pytest.raises(InputError, match=r"^the reference's tokenizer differs from the policy's.*train the reference from"):
        require_same_tokens(policy, reward_model=same, reference=other, critic=other)
    with pytest.raises(InputError, match=r"^the critic's"):
        require_same_tokens(other, critic=policy)


def test_as_many_tokens_with_other_numbers_are_not_the_same(checkpoint: Path) -> None:
    ours, theirs = load_policy(checkpoint), load_policy(checkpoint)
    ours.tokenizer.add_tokens(["<one>", "<two>"])
    theirs.tokenizer.add_tokens(["<two>", "<one>"])
    assert ours.tokenizer.get_vocab().keys() == theirs.tokenizer.get_vocab().keys()
    with pytest.raises(InputError, match="tokenizer differs"):
        require_same_tokens(ours, critic=theirs)
