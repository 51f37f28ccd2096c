"""PPO for language models: RLHF's third step (rl4llm sections 3 and 4; InstructGPT; Huang et al., arXiv 2403.17031).

    for each step:
        sample one completion of each of batch_size prompts from the policy; score it with the reward model
        old log-probs, values V and the reference's log-probs of its tokens, by the training forward
        r_t = -beta log(pi / pi_ref) at every token, + score at the last one                        (7)
        A by GAE over r and V; R = A + V                                                            (25, 28, 12)
        for each epoch, for each minibatch:
            L = clipped surrogate of A, or another trust region, - bonus * entropy                  (10, 29-33)
            L_critic = c1 * 1/2 (V - R)^2, clipped                                                  (12, 33)
            L_ptx = - lambda * mean log pi of the tokens of some demonstrations, if there are any   (14)
            AdamW step on their sum; policy and critic have no parameter in common, or a backbone   (4.3.6)

Old log-probs, values and returns are fixed for all epochs of a step. Dropout is off. What is averaged over tokens is averaged
over all tokens of the minibatch, on all processes. A completion that was cut off has no EOS, costs a penalty, and by default
counts as ended (`bootstrap`).

Departures: the reference KL is k1 alone, since the others have no gradient of a KL in a reward (`objectives/policy`).

Shapes: B completions, T tokens, N all tokens of a step's completions end to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LambdaLR

from stages.data.batching import RowOrder, TokenBatch
from stages.data.parquet import read_schema, write_rows
from stages.data.parts import Parts
from stages.data.recorded import of_one_sample
from stages.errors import InputError
from stages.models.critic import ActorCritic, TwoHeads, critic_from_policy, critic_on_policy
from stages.models.load import LoadedPolicy, load_policy, require_same_tokens, save_policy
from stages.models.logprobs import TokenLogProbs, check_log_probs
from stages.models.reward import RewardModel, check_scores, load_reward_model, save_reward_model
from stages.objectives.advantages import gae, whiten
from stages.objectives.aggregate import aggregate_tokens
from stages.objectives.kl import AdaptiveKL
from stages.objectives.likelihood import nll_loss
from stages.objectives.policy import kl_penalty_loss, policy_loss, policy_metrics, shape_rewards
from stages.objectives.value import value_loss
from stages.rollouts.batch import Rollouts
from stages.rollouts.collect import collect, measure, score, usable_prompts
from stages.rollouts.report import critic_metrics, rollout_metrics, rollout_records
from stages.run import Run
from stages.specs.ppo import PpoConfig
from stages.training import state
from stages.training.demonstrations import Demonstrations, load_demonstrations
from stages.training.meter import Meter
from stages.training.setup import accelerator_for, count_parameters, make_optimizer, set_threads
from stages.training.step import Clip, Loss, optimization_step


@dataclass(frozen=True)
class Loop:
    """What every step works with: the four models of RLHF, of which policy and critic are trained as one `module`."""

    config: PpoConfig
    accelerator: Accelerator
    policy: LoadedPolicy
    critic: RewardModel
    reward: RewardModel
    reference: LoadedPolicy
    ptx: Demonstrations | None
    module: torch.nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: LambdaLR
    clip: Clip


def ppo(
    config: PpoConfig,
    run: Run,
    *,
    policy: Path,
    reward: Path,
    prompts: Path,
    reference: Path | None = None,
    critic: Path | None = None,
    ptx: Path | None = None,
) -> None:
    """Train `policy` on `prompts` by `reward`; write `checkpoint`, `critic` and every step's `rollouts`. The reference is the
    policy that training starts from unless another is given."""
    loop = _prepare(config, run, policy, reward, reference or policy, critic, ptx)
    accelerator = loop.accelerator
    others = (loop.reward, loop.critic, loop.reference)
    rows = usable_prompts(run, prompts, loop.policy, others, config.sampling.max_new_tokens)
    order = RowOrder(len(rows), config.seed)
    parts = Parts(run, {field.name: field.type for field in read_schema(prompts) if not of_one_sample(field.name)})
    penalty = AdaptiveKL(config.old_policy_kl.target, config.old_policy_kl.coefficient)

    resumed = state.load(run, accelerator)
    start, rollouts = 0, None
    if resumed is not None:
        start, penalty.coefficient = resumed["step"], resumed["penalty"]
        rollouts = Rollouts.load(resumed["folder"], {row["id"]: row for row in rows})
    for step in range(start, config.steps):
        due = (step + 1) % config.runtime.save_every == 0 or step + 1 == config.steps
        clock = perf_counter()
        if rollouts is None:
            batch = [rows[place] for place in order.take(step * config.batch_size, config.batch_size)]
            rollouts = collect(accelerator, loop.policy, batch, config.sampling, config.seed, step, config.runtime)
            _judge(loop, rollouts, step)
            if due:
                _save(run, loop, step, penalty, parts, rollouts)
        sampled = perf_counter()
        metrics = rollout_metrics(rollouts) | critic_metrics(rollouts)
        if step == 0:
            run.log(0, {f"{name}_before": metrics[name] for name in ("reward", "length")})
        metrics |= {"lr": float(loop.scheduler.get_last_lr()[0]), "old_policy_kl_coefficient": penalty.coefficient}
        metrics |= _update(loop, rollouts, penalty, step)
        metrics |= {"seconds_sampling": sampled - clock, "seconds_updating": perf_counter() - sampled}
        parts.add(rollout_records(rollouts, step))
        rollouts, done = None, step + 1
        if done % config.runtime.log_every == 0 or done == config.steps:
            run.log(done, metrics)
        run.progress(done, config.steps, f"reward {metrics['reward']:.2f}  kl {metrics['kl']:.2f}")
        if due:
            _save(run, loop, done, penalty, parts, None)

    if accelerator.is_main_process:
        save_policy(loop.policy, run.output("checkpoint"))
        save_reward_model(loop.critic, run.output("critic"))
        write_rows(run.output("rollouts"), parts.rows(), types=parts.types)
    accelerator.wait_for_everyone()


@torch.no_grad()
def _judge(loop: Loop, rollouts: Rollouts, step: int) -> None:
    """Scores, old log-probs, values, and from them the rewards, advantages and returns of every token."""
    config, accelerator, mask_BT = loop.config, loop.accelerator, rollouts.mask_BT
    # In the first pass's own micro-batches, so that its ratios are exactly 1: batches of another shape differ in last bits.
    batches = [batch for indices in minibatches(config, step, epoch=0) for batch in _share(loop, rollouts, indices)]
    temperature, reference = config.sampling.temperature, TokenLogProbs(loop.reference.model)
    names = ("logp", "entropy", "values")
    measure(accelerator, rollouts, names, lambda batch: loop.module(batch, temperature, entropy=True), batches)
    measure(accelerator, rollouts, ("ref_logp",), lambda batch: (reference(batch, temperature),), batches)

    score_B = torch.from_numpy(score(accelerator, loop.reward, rollouts, config.runtime))
    truncated_B = torch.from_numpy(rollouts.truncated_B)
    missing_B = -config.scoring.missing_eos_penalty * truncated_B.double()
    held_B = score_B if config.scoring.clip is None else score_B.clamp(-config.scoring.clip, config.scoring.clip)
    rollouts.each = {"reward": held_B + missing_B, "rewards.model": score_B, "rewards.missing_eos": missing_B}

    logp_BT, ref_logp_BT = rollouts.padded("logp"), rollouts.padded("ref_logp")
    rewards_BT = shape_rewards(rollouts.each["reward"], logp_BT, ref_logp_BT, mask_BT, config.reference_kl)
    if config.scoring.whiten:
        rewards_BT = whiten(rewards_BT, mask_BT, shift_mean=False)
    after_B = None
    if config.bootstrap == "value":
        values_B = torch.from_numpy(score(accelerator, loop.critic, rollouts, config.runtime))
        after_B = torch.where(truncated_B, values_B, 0.0)
    advantages_BT, returns_BT = gae(rewards_BT, rollouts.padded("values"), mask_BT, config.gamma, config.lam, after_B)
    rollouts.keep("returns", returns_BT)
    rollouts.keep("advantages", whiten(advantages_BT, mask_BT) if config.whiten_advantages else advantages_BT)


def _update(loop: Loop, rollouts: Rollouts, penalty: AdaptiveKL, step: int) -> dict[str, float]:
    """Passes over a step's completions; the means of what the updates measured."""
    config, meter, norms = loop.config, Meter(), Counter[str]()
    for epoch in range(config.epochs):
        for place, indices in enumerate(minibatches(config, step, epoch)):
            total = int(rollouts.lengths_B[indices].sum())
            mixed_in, rows = _mixed_in(loop, (step * config.epochs + epoch) * config.minibatches + place, meter)
            measured = optimization_step(
                loop.accelerator,
                loop.module,
                loop.optimizer,
                loop.scheduler,
                _share(loop, rollouts, indices),
                lambda batch, total=total: _loss(loop, rollouts, penalty.coefficient, batch, total, meter),
                loop.clip,
                lambda indices=indices, rows=rows: (
                    f"step {step + 1}, prompts {[rollouts.samples[i].row['id'] for i in indices]}{rows}"
                ),
                mixed_in,
            )
            norms.update({name: measured[name] for name in loop.clip})
    if config.trust_region == "adaptive_kl":
        penalty.update(_old_policy_kl(loop, rollouts))
    updates = config.epochs * config.minibatches
    return meter.read(loop.accelerator, updates) | {name: value / updates for name, value in norms.items()}


def _loss(loop: Loop, rollouts: Rollouts, coefficient: float, batch: TokenBatch, total: int, meter: Meter) -> torch.Tensor:
    """A micro-batch's share of the minibatch's loss, which has `total` tokens: policy, critic and entropy."""
    config, mask_BT = loop.config, batch.target_BT
    logp_BT, entropy_BT, values_BT = loop.module(batch, config.sampling.temperature, entropy=config.entropy_bonus > 0)
    names = ("logp", "advantages", "values", "returns")
    old_logp_BT, advantages_BT, old_values_BT, returns_BT = (rollouts.lay_out(name, batch) for name in names)
    low, high = config.clip_low, config.clip_high
    if config.trust_region == "clip":
        policy = policy_loss(logp_BT, old_logp_BT, advantages_BT, mask_BT, low, high, aggregate="token", total=total)
    else:
        weight = 0.0 if config.trust_region == "none" else coefficient
        policy = kl_penalty_loss(logp_BT, old_logp_BT, advantages_BT, mask_BT, weight, total)
    value = value_loss(values_BT, old_values_BT, returns_BT, mask_BT, config.critic.clip, total)
    entropy = aggregate_tokens(entropy_BT, mask_BT, "token", total)

    moved = policy_metrics(logp_BT, old_logp_BT, advantages_BT, mask_BT, low, high)
    meter.top("ratio_max", moved.pop("ratio_max"))
    share = mask_BT.sum() / total
    meter.add({"policy_loss": policy, "value_loss": value} | {name: mean * share for name, mean in moved.items()})
    return policy + config.critic.coefficient * value - config.entropy_bonus * entropy


def _mixed_in(loop: Loop, number: int, meter: Meter) -> tuple[list[tuple[TokenBatch, Loss]], str]:
    """This process's share of the demonstrations of update `number`, with their loss (14), and their rows for a message."""
    ptx, demonstrations = loop.config.ptx, loop.ptx
    if ptx is None or demonstrations is None:
        return [], ""
    indices = demonstrations.order(loop.config.seed).take(number * ptx.batch_size, ptx.batch_size)
    total = demonstrations.count(indices)

    def loss(batch: TokenBatch) -> torch.Tensor:
        nll = nll_loss(loop.module(batch, 1.0, values=False)[0], batch.target_BT, total)
        meter.add({"ptx_loss": nll})
        return ptx.weight * nll

    return [(batch, loss) for batch in demonstrations.share(indices)], f", rows {demonstrations.named(indices)} of ptx"


def _old_policy_kl(loop: Loop, rollouts: Rollouts) -> float:
    """KL(old || policy) after a step's updates, in nats a token (the d of eq. 32)."""
    batches = _share(loop, rollouts, np.arange(len(rollouts)))
    measure(
        loop.accelerator,
        rollouts,
        ("new_logp",),
        lambda batch: loop.module(batch, loop.config.sampling.temperature)[:1],
        batches,
    )
    log_ratio_N = rollouts.tokens.pop("new_logp").double() - rollouts.tokens["logp"].double()
    return float((torch.expm1(log_ratio_N) - log_ratio_N).mean())


def minibatches(config: PpoConfig, step: int, epoch: int) -> list[np.ndarray]:
    """The completions of each minibatch of one pass, in a seeded order."""
    order = np.random.default_rng([config.seed, step, epoch]).permutation(config.batch_size)
    return np.array_split(order, config.minibatches)


def _share(loop: Loop, rollouts: Rollouts, indices: np.ndarray) -> Sequence[TokenBatch]:
    """This process's micro-batches of some completions."""
    return rollouts.share(loop.accelerator, indices, loop.config.runtime, loop.policy.pad_id)


def _save(run: Run, loop: Loop, step: int, penalty: AdaptiveKL, parts: Parts, rollouts: Rollouts | None) -> None:
    """A resume state after `step` steps, with the next one's completions when they wait for their update."""

    def write(folder: Path) -> None:
        parts.save(folder)
        if rollouts is not None:
            rollouts.save(folder)

    state.save(run, loop.accelerator, step, {"penalty": penalty.coefficient}, write)


def _prepare(
    config: PpoConfig, run: Run, policy: Path, reward: Path, reference: Path, critic: Path | None, ptx: Path | None
) -> Loop:
    """Load the four models and check that they fit together. Dropout is off in all of them."""
    if (config.ptx is None) != (ptx is None):
        given, lacking = ("a config `ptx`", "input `ptx`") if ptx is None else ("an input `ptx`", "config `ptx` (at least {})")
        raise InputError(f"there is {given} but no {lacking}; PPO-ptx needs both")
    accelerator = accelerator_for(config.runtime, config.dtype)
    actor, judge, anchor = (
        load_policy(policy, seed=config.seed),
        load_reward_model(reward),
        load_policy(reference, seed=config.seed),
    )
    valuer = _critic(config, actor, policy, reward, critic)
    set_threads(config.runtime, count_parameters(actor.model))
    require_same_tokens(actor, reward_model=judge, critic=valuer, reference=anchor)
    check_log_probs(actor.model, config.runtime.packed)
    check_scores(judge, packed=False)
    check_scores(valuer, config.runtime.packed)
    rows = load_demonstrations(run, accelerator, actor, ptx, "ptx", config.ptx, config.runtime) if ptx and config.ptx else None

    # A shared critic's classifier is no part of the module, yet scores with it (`bootstrap`).
    valuer.model.eval()
    for frozen in (judge.model, anchor.model):
        frozen.to(accelerator.device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    module = (TwoHeads if config.critic.shared else ActorCritic)(actor, valuer).eval()
    trained = {"": (config.optimizer, module.actor), "critic_": (config.critic.optimizer, module.critic)}
    clip = {f"{name}grad_norm": (list(part.parameters()), settings.max_grad_norm) for name, (settings, part) in trained.items()}
    updates = config.steps * config.epochs * config.minibatches
    optimizer, scheduler = make_optimizer([(settings, part.parameters()) for settings, part in trained.values()], updates)
    module, optimizer = accelerator.prepare(module, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    return Loop(config, accelerator, actor, valuer, judge, anchor, rows, module, optimizer, scheduler, clip)


def _critic(config: PpoConfig, actor: LoadedPolicy, policy: Path, reward: Path, critic: Path | None) -> RewardModel:
    """The critic that training starts with."""
    if config.critic.shared:
        return critic_on_policy(actor, load_reward_model(critic) if critic else None)
    if critic is None and config.critic.start == "policy":
        return critic_from_policy(policy, config.seed)
    return load_reward_model(critic or reward)
