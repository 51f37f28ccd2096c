"""Reward models: scores do not depend on layout or type (contracts 1 and 7), and checkpoints are plain transformers ones."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace as Namespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import INIT
from test_load import MESSAGES, bytes_of, rewrite, without_unknown
from test_logprobs import BOS, EOS, PAD, random_sequences
from test_logprobs import FAMILIES as POLICIES
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from stages.data.batching import TokenBatch, pack, pad
from stages.errors import InputError
from stages.models.load import load_policy, save_policy
from stages.models.reward import (
    RewardModel,
    SequenceScores,
    check_scores,
    load_reward_model,
    new_reward_model,
    raw_scores,
    save_reward_model,
    score_rows,
)

USER, ASSISTANT = 5, 6
BIAS, SCALE = -2 / 3, 1 / 7
HEADS: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    **{family: POLICIES[family] for family in ("llama", "qwen2", "qwen3", "mistral", "gemma2")},
    "gpt2": POLICIES["gpt2"] | {"resid_pdrop": 0.5},
    "gpt_neox": HEADS | {"intermediate_size": 32},
    # As OPT-350m: the last states are narrower than the hidden size.
    "opt": HEADS | {"ffn_dim": 32, "word_embed_proj_dim": 8, "do_layer_norm_before": False},
}
UNPACKED = {"opt"}  # its attention mixes packed sequences
each_family = pytest.mark.parametrize("family", FAMILIES)
Folders = Callable[[str], Path]


def new_policy(folder: Path, family: str, **fields: Any) -> Path:
    """A tiny policy's checkpoint, every parameter random, norms and biases too; the tokenizer is that of `init_folder`."""
    known = {"model_type": family, "initializer_range": 0.3} | FAMILIES.get(family, HEADS)
    source, made = folder / f"{family} init", folder / family
    source.mkdir()
    (source / "init.yaml").write_text(yaml.safe_dump(yaml.safe_load(INIT.read_text()) | {"model": known | fields}))
    policy = load_policy(source, seed=1)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in policy.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    save_policy(policy, made)
    return made


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    folder = tmp_path_factory.mktemp("policies")
    return lambda family: folder / family if (folder / family).exists() else new_policy(folder, family)


@pytest.fixture(scope="module")
def saved(policies: Folders, tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Reward models' checkpoints."""
    folder = tmp_path_factory.mktemp("rewards")

    def make(family: str) -> Path:
        if not (folder / family).exists():
            reward = new_reward_model(policies(family), seed=5)
            reward.calibrate(BIAS, SCALE)
            save_reward_model(reward, folder / family)
        return folder / family

    return make


@pytest.fixture
def llama(saved: Folders) -> RewardModel:
    return load_reward_model(saved("llama"))


def plain_model(folder: Path) -> Any:
    return AutoModelForSequenceClassification.from_pretrained(folder).eval()


@torch.no_grad()
def plain_scores(model: Any, sequences: list[np.ndarray]) -> torch.Tensor:
    """The oracle: transformers' own logit of each sequence alone."""
    return torch.cat([model(torch.from_numpy(ids)[None]).logits[:, 0] for ids in sequences])


def batch_of(sequences: list[np.ndarray], build: Callable[..., TokenBatch] = pad, pad_id: int = PAD) -> TokenBatch:
    return build(sequences, [1] * len(sequences), pad_id, tuple(range(len(sequences))))


@each_family
@torch.no_grad()
def test_every_layout_gives_each_sequence_what_it_has_alone(family: str, saved: Folders) -> None:
    model = plain_model(saved(family))
    sequences = random_sequences([5, 13, 1, 8, 3, 8])
    expected_B = plain_scores(model, sequences)
    assert expected_B.std() > 0.1
    for layout in (pad, pack) if family not in UNPACKED else (pad,):
        torch.testing.assert_close(SequenceScores(model)(batch_of(sequences, layout)), expected_B, atol=1e-5, rtol=0)
    # The oracle tells: the same tokens after another sequence have another score.
    [after] = plain_scores(model, [np.concatenate(sequences[3:5])])
    assert float((after - expected_B[4]).abs()) > 1e-3


@torch.no_grad()
def test_the_score_is_read_at_the_last_token_whatever_it_is(llama: RewardModel) -> None:
    """Where `<unk>` is the pad token, a completion may end with it."""
    sequences = [np.array([5, 6, 7, PAD]), np.array([5, PAD, PAD]), np.array([PAD, 8, 9, 4, EOS])]
    model: Any = llama.model.eval()
    expected_B = torch.cat([model.score(model.model(torch.from_numpy(ids)[None])[0][:, -1])[:, 0] for ids in sequences])
    for layout in (pad, pack):
        torch.testing.assert_close(SequenceScores(model)(batch_of(sequences, layout)), expected_B, atol=1e-5, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@each_family
def test_the_check_passes_for_what_is_right(family: str, training: bool, policies: Folders) -> None:
    reward = new_reward_model(policies(family), seed=5)
    reward.model.train(training)
    check_scores(reward, packed=family not in UNPACKED)
    assert reward.model.training is training
    if family in UNPACKED:
        with pytest.raises(InputError, match=r"opt: wrong by .* packed sequences: set runtime\.packed to false"):
            check_scores(reward, packed=True)


def test_the_check_knows_the_pad_token_and_refuses_other_scores(llama: RewardModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for token in range(12):
        llama.tokenizer.pad_token = llama.tokenizer.convert_ids_to_tokens(token)
        llama.model.config.pad_token_id = token
        check_scores(llama, packed=True)
    real = llama.model.forward
    for shift in (-0.02, 0.02):
        monkeypatch.setattr(llama.model, "forward", lambda input_ids, by=shift: Namespace(logits=real(input_ids).logits + by))
        with pytest.raises(InputError, match=r"llama: wrong by 0.02 in its scores: this family is not supported"):
            check_scores(llama, packed=False)


PLAIN = """
import json, sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
torch.set_num_threads(1)
found = {}
for folder, sequences in json.load(sys.stdin):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    batch = AutoTokenizer.from_pretrained(folder, padding_side="right").pad({"input_ids": sequences}, return_tensors="pt")
    with torch.no_grad():
        logits_B = model(**batch).logits[:, 0].tolist()
    found[folder] = [logits_B, model.config.reward_bias, model.config.reward_scale, batch["input_ids"].tolist()]
print(json.dumps(found))
"""


def test_checkpoints_load_with_plain_transformers_in_a_fresh_process(saved: Folders) -> None:
    # The EOS at the end is where the score is read.
    sequences = [np.append(ids, EOS) for ids in random_sequences([4, 9, 1])]
    asked = json.dumps([[str(saved(family)), [ids.tolist() for ids in sequences]] for family in FAMILIES])
    done = subprocess.run([sys.executable, "-c", PLAIN], input=asked, capture_output=True, text=True, check=True)
    for folder, (logits_B, bias, scale, padded_BT) in json.loads(done.stdout).items():
        assert (bias, scale) == (BIAS, SCALE)
        assert padded_BT[0] == [*sequences[0].tolist(), *[PAD] * 5]
        reward = load_reward_model(Path(folder))
        ours_B = raw_scores(SequenceScores(reward.model), reward, sequences, 100)
        np.testing.assert_allclose(ours_B, logits_B, atol=1e-5, rtol=0)
        assert np.ptp(ours_B) > 0.1


@each_family
def test_the_same_weights_give_the_same_bytes(family: str, policies: Folders, saved: Folders, tmp_path: Path) -> None:
    """Made again, loaded, or started from: then it stays as it is, whatever the seed."""
    again = new_reward_model(policies(family), seed=5)
    again.calibrate(BIAS, SCALE)
    files = bytes_of(saved(family))
    for number, reward in enumerate((again, load_reward_model(saved(family)), new_reward_model(saved(family), seed=77))):
        assert (reward.bias, reward.scale, reward.stops, reward.pad_id) == (BIAS, SCALE, (EOS,), PAD)
        save_reward_model(reward, tmp_path / str(number))
        assert bytes_of(tmp_path / str(number)) == files
    assert set(files) >= {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    config = json.loads(files["config.json"])
    assert [config["reward_bias"], config["reward_scale"], config["eos_token_id"]] == [BIAS, SCALE, EOS]
    assert not any(str(policies(family).parent).encode() in content for content in files.values())


@each_family
def test_the_backbone_is_the_policys_and_the_head_is_drawn_from_the_seed(family: str, policies: Folders) -> None:
    backbone: Any = load_policy(policies(family)).model.base_model
    torch.manual_seed(1)
    reward = new_reward_model(policies(family), seed=5)
    torch.manual_seed(2)
    again, other = (new_reward_model(policies(family), seed=seed).model.state_dict() for seed in (5, 6))
    found = reward.model.state_dict()
    for name, weight in backbone.state_dict().items():
        assert torch.equal(found.pop(f"{reward.model.base_model_prefix}.{name}"), weight), name
    assert list(found) == ["score.weight"]
    assert torch.equal(found["score.weight"], again["score.weight"])
    assert not torch.isclose(found["score.weight"], other["score.weight"]).any()
    assert (reward.bias, reward.scale) == (0.0, 1.0)


def test_the_deviation_of_a_new_head(tmp_path: Path) -> None:
    small = {"hidden_size": 1023, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
    head: Any = new_reward_model(new_policy(tmp_path, "llama", **small), seed=3).model.score
    assert head.weight.shape == (1, 1023)
    assert head.weight.std().item() * 32 == pytest.approx(1, abs=0.08)
    assert head.weight.mean().item() * 32 == pytest.approx(0, abs=0.12)


def test_rewards_are_shifted_and_then_scaled(llama: RewardModel) -> None:
    llama.calibrate(-3.0, 0.5)
    np.testing.assert_array_equal(llama.rewards(np.array([1.0, 5.0, np.nan])), [-1.0, 1.0, np.nan])


def test_several_stops_of_the_policy_survive(policies: Folders, tmp_path: Path) -> None:
    save_policy(load_policy(policies("llama")), tmp_path / "policy")
    rewrite(tmp_path / "policy", "generation_config.json", eos_token_id=[11, EOS, 12])
    reward = new_reward_model(tmp_path / "policy", seed=5)
    assert reward.stops == (EOS, 11, 12)
    save_reward_model(reward, tmp_path / "reward")
    assert AutoConfig.from_pretrained(tmp_path / "reward").eos_token_id == [EOS, 11, 12]
    assert load_reward_model(tmp_path / "reward").stops == (EOS, 11, 12)


@torch.no_grad()
def test_pad_equal_to_eos_in_the_source_changes_nothing(policies: Folders, tmp_path: Path) -> None:
    save_policy(load_policy(policies("llama")), tmp_path / "policy")
    without_unknown(tmp_path / "policy")
    reward = new_reward_model(tmp_path / "policy", seed=5)
    sequences = [np.array([0, *range(5, 12), 1]), np.array([0, 7, 1])]
    expected_B = torch.cat([SequenceScores(reward.model.eval())(batch_of([ids])) for ids in sequences])
    # A checkpoint from elsewhere: its pad is its EOS, and it has no row for another.
    save_reward_model(reward, tmp_path / "foreign")
    foreign = plain_model(tmp_path / "foreign")
    foreign.resize_token_embeddings(134)
    foreign.save_pretrained(tmp_path / "foreign")
    (tmp_path / "foreign" / "generation_config.json").write_text("{}")
    without_unknown(tmp_path / "foreign")
    for one in (reward, load_reward_model(tmp_path / "foreign")):
        assert (one.pad_id, one.model.config.pad_token_id, one.stops, one.model.config.vocab_size) == (134, 134, (1,), 135)
        check_scores(one, packed=True)
        found_B = raw_scores(SequenceScores(one.model), one, sequences, 99)
        np.testing.assert_allclose(found_B, expected_B.numpy(), atol=1e-6)
        save_reward_model(one, tmp_path / "saved")
        plain_B = plain_model(tmp_path / "saved")(batch_of(sequences, pad_id=134).ids_BT).logits[:, 0]
        torch.testing.assert_close(plain_B, expected_B, atol=1e-5, rtol=0)


@pytest.mark.parametrize("max_tokens", [1, 9, 20, 10_000])
def test_raw_scores_keep_the_order(llama: RewardModel, max_tokens: int) -> None:
    sequences = random_sequences([5, 13, 1, 8, 3, 8, 20])
    found_B = raw_scores(SequenceScores(llama.model), llama, sequences, max_tokens)
    assert found_B.dtype == np.float64
    np.testing.assert_allclose(found_B, plain_scores(llama.model.eval(), sequences).numpy(), atol=1e-5)
    assert raw_scores(SequenceScores(llama.model), llama, [], max_tokens).shape == (0,)


def test_raw_scores_are_without_dropout_and_gradient_and_the_mode_comes_back(saved: Folders) -> None:
    reward = load_reward_model(saved("gpt2"))
    scores, sequences = SequenceScores(reward.model), random_sequences([9, 4])
    expected_B = plain_scores(plain_model(saved("gpt2")), sequences).numpy()
    with_gradient: list[bool] = []
    scores.register_forward_hook(lambda *_: with_gradient.append(torch.is_grad_enabled()))
    for training in (False, True):
        scores.train(training)
        np.testing.assert_allclose(raw_scores(scores, reward, sequences, 20), expected_B, atol=1e-5)
        assert (scores.training, reward.model.training) == (training, training)
    assert with_gradient == [False, False]
    # The dropout is there: with it the scores are others.
    assert float(np.abs(scores(batch_of(sequences)).detach().numpy() - expected_B).max()) > 1e-3


def test_rows_are_scored_with_the_eos_that_ends_them(llama: RewardModel) -> None:
    tokenizer: Any = llama.tokenizer
    question, answer = (tokenizer(text)["input_ids"] for text in ("12+3-9", "<answer>6</answer>"))
    chat, text = {"prompt": MESSAGES}, {"prompt": "12+3-9"}
    rows: list[dict[str, Any]] = [
        text | {"completion": "<answer>6</answer>"},
        chat | {"completion": "<answer>6</answer>", "finish": "stop"},
        chat | {"completion": "<answer>6</answer>" * 9, "finish": "stop"},
        chat | {"completion": "<answer>6</answer>", "finish": "length"},
        text | {"completion": "<answer>6</answer>", "finish": "length"},
        text | {"completion": "<answer>6<|user|>", "finish": "stop"},
    ]
    told = [BOS, USER, *question, ASSISTANT, *answer]
    written = [[*question, *answer, EOS], [*told, EOS], told, [*question, *answer], [*question, *answer[:-1], USER]]
    expected = plain_scores(llama.model.eval(), [np.array(ids) for ids in written]).tolist()
    assert len({round(one, 4) for one in expected}) == len(expected)
    expected.insert(2, np.nan)
    reward = RewardModel(llama.model, tokenizer, (EOS, USER))
    scores, longest = SequenceScores(reward.model), len(told) + 1
    for max_tokens in (1, 1000):
        np.testing.assert_allclose(score_rows(scores, reward, rows, longest, max_tokens), expected, atol=1e-5)
    # One token less, and a chat fits only without its EOS.
    assert np.isnan(score_rows(scores, reward, rows, longest - 1, 1000)).tolist() == [False, True, True, *[False] * 3]
    assert np.isnan(score_rows(scores, reward, rows, 2, 1000)).all()


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@torch.no_grad()
def test_scores_are_float32_and_not_rounded_whatever_the_type(family: str, saved: Folders) -> None:
    sequences = random_sequences([9, 4, 6])
    batch = batch_of(sequences)
    whole, half = load_reward_model(saved(family)).model.eval(), load_reward_model(saved(family), "bfloat16").model.eval()
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    for model, autocast in ((whole, True), (half, False), (half, True)):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            found_B = SequenceScores(model)(batch)
            states: Any = model.base_model(batch.ids_BT, attention_mask=batch.attention_BT).last_hidden_state
        assert found_B.dtype == torch.float32
        assert not torch.equal(found_B, found_B.bfloat16().float())
        head: Any = model.score
        expected_B = (states[torch.arange(3), [8, 3, 5]].float() @ head.weight.float().T)[:, 0]
        torch.testing.assert_close(found_B, expected_B, atol=1e-5, rtol=0)
        torch.testing.assert_close(found_B, plain_scores(whole, sequences), atol=0.1, rtol=0)


@each_family
def test_gradients_reach_every_parameter(family: str, policies: Folders) -> None:
    scores = SequenceScores(new_reward_model(policies(family), seed=5).model.train())
    scores(batch_of(random_sequences([9, 4]))).sum().backward()
    for name, parameter in scores.named_parameters():
        assert parameter.grad is not None, name
        # Attention does not change when its keys all move by one vector.
        assert parameter.grad.any() or "k_proj.bias" in name, name


def test_models_that_cannot_score_are_refused(policies: Folders, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"llama: not a reward model: .* `reward_model`"):
        load_reward_model(policies("llama"))
    with pytest.raises(InputError, match="granite: transformers has no sequence classifier of this family"):
        new_reward_model(new_policy(tmp_path, "granite", intermediate_size=32), seed=0)


@pytest.mark.parametrize("labels", [2, 3])
def test_a_classifier_of_several_labels_is_refused(labels: int, saved: Folders, tmp_path: Path) -> None:
    config: Any = AutoConfig.from_pretrained(saved("llama"), num_labels=labels)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    for load in (load_reward_model, lambda folder: new_reward_model(folder, seed=0)):
        with pytest.raises(InputError, match=f"a classifier of {labels} labels; a reward model has one"):
            load(tmp_path)


NAMED_OTHERWISE = {"ctrl": {"dff": 32}, "modernbert-decoder": {"intermediate_size": 32}}


@pytest.mark.parametrize("family", NAMED_OTHERWISE)
def test_a_head_of_another_name_is_refused(family: str, tmp_path: Path) -> None:
    folder = new_policy(tmp_path, family, **NAMED_OTHERWISE[family])
    with pytest.raises(InputError, match=family):
        check_scores(new_reward_model(folder, seed=0), packed=False)
    config: Any = AutoConfig.from_pretrained(folder, num_labels=1)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "foreign")
    with pytest.raises(InputError, match=f"{family}: its classifier has no linear head `score`"):
        load_reward_model(tmp_path / "foreign")


def test_a_head_with_a_bias_is_refused(saved: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    model = plain_model(saved("llama"))
    model.score = nn.Linear(16, 1)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda *_, **__: model)
    with pytest.raises(InputError, match="llama: its classifier has no linear head `score` without a bias"):
        load_reward_model(saved("llama"))
