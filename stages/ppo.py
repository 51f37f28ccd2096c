"""PPO for language models: RLHF's third step (rl4llm sections 3 and 4; InstructGPT; Huang et al., arXiv 2403.17031).

    for each step:
        sample one completion y of each of batch_size prompts from the policy; score it with the reward model
        old log-probs, values V and the reference's log-probs of its tokens, by the training forward
        r_t = -beta log(pi / pi_ref) at every token, + score at the last one                        (7)
        A by GAE over r and V; R = A + V                                                            (25, 28, 12)
        for each epoch, for each minibatch:
            L = clipped surrogate of A, or one of the other trust regions                           (10, 29-32)
                - entropy bonus * entropy                                                           (33)
            L_critic = 1/2 (V - R)^2, clipped                                                       (12)
            AdamW step on both: they have no parameter in common

Old log-probs, values and returns are fixed for all epochs of a step. Dropout is off. Every number that is averaged over tokens
is averaged over all tokens of the minibatch, on all processes. A completion that was cut off has no EOS, costs a penalty, and
by default counts as ended (`bootstrap`).

Departures: none from the papers in the maths; the reference KL is k1 alone (see `objectives/policy.shape_rewards`).

Shapes: B completions, T tokens, N all tokens of a step's completions end to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer

from stages.data.batching import RowOrder, TokenBatch, pad
from stages.data.chat import encode_prompt
from stages.data.parquet import read_schema, write_rows
from stages.data.parts import Parts
from stages.errors import InputError
from stages.models.critic import ActorCritic, critic_from_policy, critic_from_reward
from stages.models.load import LoadedPolicy, load_policy, save_policy
from stages.models.logprobs import TokenLogProbs, check_log_probs
from stages.models.reward import RewardModel, check_scores, load_reward_model, save_reward_model
from stages.objectives.advantages import gae, whiten
from stages.objectives.aggregate import aggregate_tokens
from stages.objectives.kl import AdaptiveKL
from stages.objectives.policy import kl_penalty_loss, policy_loss, policy_metrics, shape_rewards
from stages.objectives.value import explained_variance, value_loss
from stages.rollouts.batch import Rollouts
from stages.rollouts.collect import collect, measure, score
from stages.rollouts.sample import RECORDED, Row
from stages.run import Run
from stages.specs.ppo import PpoConfig
from stages.training import state
from stages.training.meter import Meter
from stages.training.setup import accelerator_for, count_parameters, make_optimizer, set_threads
from stages.training.step import Clip, optimization_step


@dataclass(frozen=True)
class Models:
    """The four models of RLHF. Only the policy and the critic are trained."""

    policy: LoadedPolicy
    critic: RewardModel
    reward: RewardModel
    reference: LoadedPolicy


def ppo(
    config: PpoConfig,
    run: Run,
    *,
    policy: Path,
    reward: Path,
    prompts: Path,
    reference: Path | None = None,
    critic: Path | None = None,
) -> None:
    """Train `policy` on `prompts` by `reward`; write `checkpoint`, `critic` and every step's `rollouts`. The reference is the
    policy that training starts from unless another is given."""
    accelerator = accelerator_for(config.runtime, config.dtype)
    models = _load(config, policy, reward, reference or policy, critic)
    set_threads(config.runtime, count_parameters(models.policy.model))
    rows = _usable(config, run, models, prompts)
    module, optimizer, scheduler, clip = _prepare(config, accelerator, models)
    order = RowOrder(len(rows), config.seed)
    old_policy_kl = AdaptiveKL(config.old_policy_kl.target, config.old_policy_kl.coefficient)
    types = {field.name: field.type for field in read_schema(prompts) if field.name not in RECORDED}
    parts = Parts(run, types)

    resumed = state.load(run, accelerator)
    start, rollouts = 0, None
    if resumed is not None:
        start, old_policy_kl.coefficient = resumed["step"], resumed["coefficient"]
        rollouts = Rollouts.load(resumed["folder"], {row["id"]: row for row in rows})

    for step in range(start, config.steps):
        due = (step + 1) % config.runtime.save_every == 0 or step + 1 == config.steps
        clock = perf_counter()
        if rollouts is None:
            batch_rows = [rows[place] for place in order.take(step * config.batch_size, config.batch_size)]
            rollouts = collect(accelerator, models.policy, batch_rows, config.sampling, config.seed, step, config.runtime)
            _judge(config, accelerator, models, module, rollouts, step)
            if due:
                _save(run, accelerator, step, old_policy_kl, parts, rollouts)
        sampled = perf_counter()
        measured = _update(config, accelerator, models, module, optimizer, scheduler, clip, rollouts, old_policy_kl, step)
        metrics = _metrics(rollouts) | measured
        metrics |= {"seconds_sampling": sampled - clock, "seconds_updating": perf_counter() - sampled}
        parts.add(_records(rollouts, step))
        done = step + 1
        if done == 1:
            run.log(0, {"reward_before": metrics["reward"], "length_before": metrics["length"]})
        if done % config.runtime.log_every == 0 or done == config.steps:
            run.log(done, metrics | {"lr": scheduler.get_last_lr()[0], "old_policy_kl_coefficient": old_policy_kl.coefficient})
        run.progress(done, config.steps, f"reward {metrics['reward']:.2f}  kl {metrics['kl']:.2f}")
        rollouts = None
        if due:
            _save(run, accelerator, done, old_policy_kl, parts, None)

    if accelerator.is_main_process:
        save_policy(models.policy, run.output("checkpoint"))
        save_reward_model(models.critic, run.output("critic"))
        write_rows(run.output("rollouts"), parts.rows(), types=types)
    accelerator.wait_for_everyone()


def minibatches(config: PpoConfig, step: int, epoch: int) -> list[np.ndarray]:
    """The completions of each minibatch of one pass, in a seeded order."""
    order = np.random.default_rng([config.seed, step, epoch]).permutation(config.batch_size)
    return np.array_split(order, config.minibatches)


@torch.no_grad()
def _judge(
    config: PpoConfig, accelerator: Accelerator, models: Models, module: torch.nn.Module, rollouts: Rollouts, step: int
) -> None:
    """Scores, old log-probs, values, and from them the rewards, advantages and returns of every token."""
    temperature, mask_BT = config.sampling.temperature, rollouts.mask_BT
    # In the first pass's own micro-batches, so that its ratios are exactly 1: batches of another shape differ in last bits.
    batches = [
        batch
        for indices in minibatches(config, step, epoch=0)
        for batch in _share(config, accelerator, models, rollouts, indices)
    ]
    measure(
        accelerator, rollouts, ("logp", "entropy", "values"), lambda batch: module(batch, temperature, entropy=True), batches
    )
    reference = TokenLogProbs(models.reference.model)
    with accelerator.autocast():
        measure(accelerator, rollouts, ("ref_logp",), lambda batch: (reference(batch, temperature),), batches)

    scores_B = torch.from_numpy(score(accelerator, models.reward, rollouts, config.runtime))
    clip = config.scoring.clip
    clipped_B = scores_B if clip is None else scores_B.clamp(-clip, clip)
    truncated_B = torch.from_numpy(rollouts.truncated_B)
    missing_B = -config.scoring.missing_eos_penalty * truncated_B.double()
    rollouts.each = {"score": scores_B, "missing_eos": missing_B}

    logp_BT, ref_logp_BT = rollouts.padded("logp"), rollouts.padded("ref_logp")
    rewards_BT = shape_rewards(clipped_B + missing_B, logp_BT, ref_logp_BT, mask_BT, config.reference_kl)
    if config.scoring.whiten:
        rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False)
    bootstrap_B = None
    if config.bootstrap == "value":
        after_B = torch.from_numpy(score(accelerator, models.critic, rollouts, config.runtime))
        bootstrap_B = torch.where(truncated_B, after_B, 0.0)
    advantages_BT, returns_BT = gae(rewards_BT, rollouts.padded("values"), mask_BT, config.gamma, config.lam, bootstrap_B)
    rollouts.keep("returns", returns_BT)
    rollouts.keep("advantages", whiten(advantages_BT, mask_BT) if config.whiten_advantages else advantages_BT)


def _update(
    config: PpoConfig,
    accelerator: Accelerator,
    models: Models,
    module: torch.nn.Module,
    optimizer: AcceleratedOptimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    clip: Clip,
    rollouts: Rollouts,
    old_policy_kl: AdaptiveKL,
    step: int,
) -> dict[str, float]:
    """Passes over a step's completions; the means of what the updates measured."""
    meter, updates, norms = Meter(), 0, Counter[str]()
    for epoch in range(config.epochs):
        for indices in minibatches(config, step, epoch):
            total = int(rollouts.lengths_B[indices].sum())
            made = optimization_step(
                accelerator,
                module,
                optimizer,
                scheduler,
                _share(config, accelerator, models, rollouts, indices),
                lambda batch, total=total: _loss(config, module, rollouts, old_policy_kl.coefficient, batch, total, meter),
                clip,
                lambda indices=indices: f"step {step + 1}, prompts {[rollouts.samples[i].row['id'] for i in indices]}",
            )
            norms.update({name: value for name, value in made.items() if name != "loss"})
            updates += 1
    if config.trust_region == "adaptive_kl":
        measure(
            accelerator,
            rollouts,
            ("new_logp",),
            lambda batch: module(batch, config.sampling.temperature)[:1],
            _share(config, accelerator, models, rollouts, range(len(rollouts))),
        )
        log_ratio_N = rollouts.tokens["new_logp"].double() - rollouts.tokens["logp"].double()
        old_policy_kl.update(float((torch.expm1(log_ratio_N) - log_ratio_N).mean()))
    return meter.read(accelerator, updates) | {name: value / updates for name, value in norms.items()}


def _loss(
    config: PpoConfig,
    module: torch.nn.Module,
    rollouts: Rollouts,
    coefficient: float,
    batch: TokenBatch,
    total: int,
    meter: Meter,
) -> torch.Tensor:
    """A micro-batch's share of the minibatch's loss: policy, critic and entropy."""
    logp_BT, entropy_BT, values_BT = module(batch, config.sampling.temperature, entropy=config.entropy_bonus > 0)
    mask_BT = batch.target_BT
    old_BT, advantages_BT, returns_BT = (rollouts.lay_out(name, batch) for name in ("logp", "advantages", "returns"))
    if config.trust_region == "clip":
        clips = (config.clip_low, config.clip_high)
        policy = policy_loss(logp_BT, old_BT, advantages_BT, mask_BT, *clips, aggregate="token", total=total)
    else:
        weight = 0.0 if config.trust_region == "none" else coefficient
        policy = kl_penalty_loss(logp_BT, old_BT, advantages_BT, mask_BT, weight, total)
    value = value_loss(values_BT, rollouts.lay_out("values", batch), returns_BT, mask_BT, config.critic.clip, total)
    entropy = aggregate_tokens(entropy_BT, mask_BT, "token", total)

    far = policy_metrics(logp_BT, old_BT, advantages_BT, mask_BT, config.clip_low, config.clip_high)
    meter.top("ratio_max", far.pop("ratio_max"))
    weight = mask_BT.sum() / total
    meter.add({"policy_loss": policy, "value_loss": value} | {name: value * weight for name, value in far.items()})
    return policy + value - config.entropy_bonus * entropy


def _metrics(rollouts: Rollouts) -> dict[str, float]:
    """A step's completions in numbers; `reward` is the reward model's alone, `kl` nats a completion."""
    kl_B = rollouts.sums_B(rollouts.tokens["logp"] - rollouts.tokens["ref_logp"])
    values_N, returns_N = rollouts.tokens["values"], rollouts.tokens["returns"]
    return {
        "reward": float(rollouts.each["score"].mean()),
        "reward_std": float(rollouts.each["score"].std()),
        "rewards.missing_eos": float(rollouts.each["missing_eos"].mean()),
        "kl": float(kl_B.mean()),
        "entropy": float(rollouts.tokens["entropy"].mean()),
        "explained_variance": float(explained_variance(values_N[None], returns_N[None], torch.ones_like(values_N)[None])),
        "value": float(values_N.mean()),
        "return": float(returns_N.mean()),
        "length": float(rollouts.lengths_B.mean()),
        "truncated": float(rollouts.truncated_B.mean()),
    }


def _records(rollouts: Rollouts, step: int) -> list[Row]:
    """The step's completions as rows of the rollouts dataset."""
    kl_B = rollouts.sums_B(rollouts.tokens["logp"] - rollouts.tokens["ref_logp"])
    advantage_B = rollouts.sums_B(rollouts.tokens["advantages"]) / rollouts.lengths_B
    score_B, missing_B = (rollouts.each[name].tolist() for name in ("score", "missing_eos"))
    return [
        sample.record(step, "policy")
        | {
            "reward": score_B[i] + missing_B[i],
            "rewards.model": score_B[i],
            "rewards.missing_eos": missing_B[i],
            "kl": float(kl_B[i]),
            "advantage": float(advantage_B[i]),
        }
        for i, sample in enumerate(rollouts.samples)
    ]


def _share(
    config: PpoConfig, accelerator: Accelerator, models: Models, rollouts: Rollouts, indices: Sequence[int] | np.ndarray
) -> list[TokenBatch]:
    """This process's micro-batches of some completions; without any, a sequence of which no token counts."""
    mine, runtime, pad_id = (
        indices[accelerator.process_index :: accelerator.num_processes],
        config.runtime,
        models.policy.pad_id,
    )
    batches = rollouts.batches(mine, runtime.micro_batch_tokens, runtime.packed, pad_id)
    return batches or [pad([rollouts.ids(0)], [len(rollouts.ids(0))], pad_id, ())]


def _save(
    run: Run, accelerator: Accelerator, step: int, old_policy_kl: AdaptiveKL, parts: Parts, rollouts: Rollouts | None
) -> None:
    """A resume state, with the step's completions when they wait for their update."""

    def write(folder: Path) -> None:
        parts.save(folder)
        if rollouts is not None:
            rollouts.save(folder)

    state.save(run, accelerator, step, {"coefficient": old_policy_kl.coefficient}, write)


def _load(config: PpoConfig, policy: Path, reward: Path, reference: Path, critic: Path | None) -> Models:
    actor, judge = load_policy(policy, seed=config.seed), load_reward_model(reward)
    if critic is not None:
        valuer = critic_from_reward(critic)
    else:
        valuer = critic_from_reward(reward) if config.critic.start == "reward" else critic_from_policy(policy)
    models = Models(actor, valuer, judge, load_policy(reference, seed=config.seed))
    for name, other in (("reward model", judge), ("critic", valuer), ("reference", models.reference)):
        if other.tokenizer.get_vocab() != actor.tokenizer.get_vocab():
            raise InputError(
                f"the {name}'s tokenizer differs from the policy's, so it would read other tokens than were sampled: "
                f"train it from a model of the policy's family"
            )
    check_log_probs(actor.model, config.runtime.packed)
    check_scores(judge, packed=False)
    check_scores(valuer, config.runtime.packed)
    return models


def _usable(config: PpoConfig, run: Run, models: Models, prompts: Path) -> list[Row]:
    """The prompts' rows, those left out that fill the context of the policy, or with a completion that of another model."""
    rows, dropped = [], 0
    others = min(models.reward.context, models.critic.context, models.reference.context)
    for row in run.rows(prompts):
        length = len(encode_prompt(models.policy.tokenizer, row["prompt"]))
        longest = min(models.policy.context, length + config.sampling.max_new_tokens)
        if 0 < length < models.policy.context and longest <= others:
            rows.append(row)
        else:
            dropped += 1
    if not rows:
        raise InputError(f"all {dropped} prompts fill the models' context; shorten them, or lower sampling.max_new_tokens")
    run.table("prompts", [{"what": "used", "rows": len(rows)}, {"what": "dropped: fill the context", "rows": dropped}])
    return rows


def _prepare(
    config: PpoConfig, accelerator: Accelerator, models: Models
) -> tuple[Any, AcceleratedOptimizer, torch.optim.lr_scheduler.LambdaLR, Clip]:
    """The trained module with its optimizer, and the frozen models on their device. Dropout is off in all of them."""
    for frozen in (models.reward.model, models.reference.model):
        frozen.to(accelerator.device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    module = ActorCritic(models.policy, models.critic).eval()
    actor, critic = list(module.actor.parameters()), list(module.critic.parameters())
    updates = config.steps * config.epochs * config.minibatches
    optimizer, scheduler = make_optimizer([(config.optimizer, actor), (config.critic.optimizer, critic)], updates)
    clip = {
        "grad_norm": (actor, config.optimizer.max_grad_norm),
        "critic_grad_norm": (critic, config.critic.optimizer.max_grad_norm),
    }
    module, optimizer = accelerator.prepare(module, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    return module, optimizer, scheduler, clip
