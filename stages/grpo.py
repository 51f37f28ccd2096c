"""GRPO: reinforcement learning from rewards compared within a group (rl4llm section 6; DeepSeekMath, arXiv 2402.03300).

    for each step:                                                                (the outer iteration is the flow's business)
        sample G completions of each of P prompts from the policy; score each with the mixed reward, whose verifiers begin
            as soon as a completion has ended
        groups whose rewards do not differ: other prompts in their place, if so configured      (DAPO's dynamic sampling)
        A_i = (r_i - mean of its group) / deviation of its group, at every token of completion i               (6.3)
              or, under process supervision, at each token the sum of its and later steps' normalised scores
        for each epoch (mu of them), for each minibatch of whole groups:
            L = clipped surrogate of A                                                                          (82)
                or -log sigmoid(beta (log pi_i - log pi_j)) over the pairs of a group with r_i > r_j
            L_ref = + coefficient * KL(policy || reference) by k2 or k3                                         (82)
            AdamW step

Groups are compared before anything is left out of the loss. What a sum over a minibatch is divided by is counted over all of
it, on all processes. A completion without a reward takes part in nothing. Dropout is off.

Departures: with one update a step the ratio is 1, so no old log-probs are computed for it; completions whose loss is 0 whatever
the policy (advantage 0, no KL in the loss) count in the divisor, but are not run; off policy the KL term is weighted by the
ratio, without which it would estimate another policy's KL.

Shapes: B completions (P prompts times G), T tokens, N all tokens of a step's completions end to end.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.lr_scheduler import LambdaLR

from stages.data.batching import RowOrder, TokenBatch
from stages.data.curriculum import in_curriculum
from stages.data.parquet import read_schema, write_rows
from stages.data.parts import Parts
from stages.data.recorded import of_one_sample
from stages.models.load import LoadedPolicy, load_policy, require_same_tokens, save_policy
from stages.models.logprobs import TokenLogProbs, check_log_probs
from stages.objectives.advantages import group_advantages, process_advantages
from stages.objectives.kl import kl_loss
from stages.objectives.policy import policy_loss, policy_metrics
from stages.rewards.learned import load_judges, model_arguments
from stages.rewards.mix import Mixture
from stages.rollouts import groups
from stages.rollouts.batch import Rollouts
from stages.rollouts.collect import collect, measure, usable_prompts
from stages.rollouts.report import record_types, rollout_metrics, rollout_records
from stages.rollouts.rewarded import give_rewards, punish_length, rated_steps, verify_as_ended
from stages.rollouts.sample import Row
from stages.run import Run
from stages.specs.grpo import GrpoConfig
from stages.training import state
from stages.training.meter import Meter
from stages.training.setup import accelerator_for, count_parameters, make_optimizer, set_threads
from stages.training.step import Clip, optimization_step

# The sampler's log-probs serve as the policy's own where they agree; whether they do is looked at every so many steps.
AGREEMENT, LOOK_EVERY = 1e-5, 100
STUCK = 5
STUCK_FOR = (
    "in the last {steps} steps no group's rewards differed, so nothing is learnt: take easier or harder prompts (curriculum), "
    "larger groups (group), other prompts in their place (refill.rounds), or a reward that tells more apart"
)


@dataclass(frozen=True)
class Loop:
    """What every step works with."""

    config: GrpoConfig
    accelerator: Accelerator
    policy: LoadedPolicy
    reference: LoadedPolicy | None
    mixture: Mixture
    module: torch.nn.Module
    optimizer: AcceleratedOptimizer
    scheduler: LambdaLR
    clip: Clip

    @property
    def one_update(self) -> bool:
        """Whether a step updates once, so that its completions are always the policy's own."""
        return self.config.epochs * self.config.minibatches == 1


@dataclass
class Position:
    """Where the loop stands: steps done, prompts drawn, whether the sampler's log-probs are as good as the policy's."""

    step: int = 0
    drawn: int = 0
    agrees: bool = False


def grpo(
    config: GrpoConfig,
    run: Run,
    *,
    policy: Path,
    prompts: Path,
    reference: Path | None = None,
    **judges: Path,
) -> None:
    """Train `policy` on `prompts`; write `checkpoint` and every step's `rollouts`. The reference is the policy that training
    starts from unless another is given; `judges` are the models that rewards read. Raises InputError, before anything is
    sampled, for rows that no reward can rate."""
    loop = _prepare(config, policy, reference or policy, judges)
    accelerator = loop.accelerator
    rows = _usable(loop, run, prompts)
    order = RowOrder(len(rows), config.seed, shuffle=config.curriculum.order == "shuffled")
    types = {field.name: field.type for field in read_schema(prompts) if not of_one_sample(field.name)}
    parts = Parts(run, types | record_types(loop.mixture.keys))

    at, rollouts, stuck = Position(), None, 0
    if (resumed := state.load(run, accelerator)) is not None:
        at = Position(resumed["step"], resumed["drawn"], resumed["agrees"])
        rollouts = Rollouts.load(resumed["folder"], {row["id"]: row for row in rows})
    while at.step < config.steps:
        due = (at.step + 1) % config.runtime.save_every == 0 or at.step + 1 == config.steps
        clock = perf_counter()
        if rollouts is None:
            rollouts = _sample(loop, rows, order, at)
            _judge(loop, rollouts, at)
            if due:
                _save(run, loop, at, parts, rollouts)
        sampled = perf_counter()
        metrics = rollout_metrics(rollouts) | groups.group_metrics(loop.config, rollouts)
        if at.step == 0:
            run.log(0, {f"{name}_before": metrics[name] for name in ("reward", "length") if name in metrics})
        metrics |= {"lr": float(loop.scheduler.get_last_lr()[0])} | _update(loop, rollouts, at.step)
        metrics |= {"seconds_sampling": sampled - clock, "seconds_updating": perf_counter() - sampled}
        parts.add(rollout_records(rollouts, at.step))
        stuck = stuck + 1 if metrics["groups_without_spread"] == metrics["groups"] else 0
        if stuck and stuck % STUCK == 0:
            run.message(STUCK_FOR.format(steps=stuck))
        rollouts, at.step = None, at.step + 1
        if at.step % config.runtime.log_every == 0 or at.step == config.steps:
            run.log(at.step, metrics)
        said = f"reward {metrics['reward']:.2f}" if "reward" in metrics else "no reward"
        run.progress(at.step, config.steps, f"{said}  length {metrics['length']:.0f}")
        if due:
            _save(run, loop, at, parts, None)

    if accelerator.is_main_process:
        save_policy(loop.policy, run.output("checkpoint"))
        write_rows(run.output("rollouts"), parts.rows(), types=parts.types)
    accelerator.wait_for_everyone()


def _sample(loop: Loop, rows: list[Row], order: RowOrder, at: Position) -> Rollouts:
    """A step's completions with their rewards; with dynamic sampling more of them, until enough groups have spread."""
    config, seen, wanted = loop.config, Counter[str](), loop.config.prompts
    rollouts: Rollouts | None = None
    draw = partial(collect, loop.accelerator, loop.policy, samples=config.group, seen=seen)
    for _ in range(1 + config.refill.rounds):
        batch = [rows[place] for place in order.take(at.drawn, wanted)]
        at.drawn += wanted
        with loop.mixture.begin() as begun:
            more = draw(batch, config.sampling, config.seed, at.step, config.runtime, ended=verify_as_ended(begun))
            give_rewards(loop.accelerator, begun, more)
        if config.truncation.how == "penalise":
            punish_length(more, config.truncation, config.sampling.max_new_tokens)
        rollouts = more if rollouts is None else rollouts.joined(more)
        wanted = config.prompts - len(np.unique(rollouts.groups_B[groups.with_spread(config, rollouts)]))
        if wanted <= 0:
            break
    assert rollouts is not None
    return rollouts


@torch.no_grad()
def _judge(loop: Loop, rollouts: Rollouts, at: Position) -> None:
    """Advantages of every token, and the log-probs that the update, the KL and its report need."""
    config, kl = loop.config, loop.config.reference_kl
    if config.reference_kl.penalised_in == "reward":
        _measure(loop, rollouts, at, groups.counted(config, rollouts))
    reward_B, groups_B = rollouts.each["reward"], torch.from_numpy(rollouts.groups_B)
    if config.supervision == "process":
        scores, ends = rated_steps(loop.policy.tokenizer, rollouts)
        advantages_BT = process_advantages(scores, ends, groups_B, int(rollouts.lengths_B.max()))
    else:
        if config.reference_kl.penalised_in == "reward":
            drift_B = rollouts.sums_B(rollouts.tokens["logp"] - rollouts.tokens["ref_logp"])
            reward_B = reward_B - kl.coefficient * torch.from_numpy(drift_B)
        advantages_B = group_advantages(reward_B, groups_B, config.scale, ~reward_B.isnan())
        advantages_BT = advantages_B[:, None].expand(-1, int(rollouts.lengths_B.max()))
    rollouts.keep("advantages", advantages_BT)
    if config.reference_kl.penalised_in != "reward":
        _measure(loop, rollouts, at, groups.taught(config, rollouts))


def _measure(loop: Loop, rollouts: Rollouts, at: Position, run_B: np.ndarray) -> None:
    """Log-probs of the sampled tokens under the policy and the reference, as far as anything needs them."""
    if loop.one_update and loop.reference is None:
        return
    # The first pass's own micro-batches, so that its ratios are exactly 1: batches of another shape differ in last bits.
    passes = [members[run_B[members]] for members in groups.minibatches(loop.config, rollouts, at.step, epoch=0)]
    batches = [batch for indices in [*passes, np.flatnonzero(~run_B)] for batch in _share(loop, rollouts, indices)]
    temperature = loop.config.sampling.temperature
    rollouts.tokens["logp"] = torch.tensor([one for sample in rollouts.samples for one in sample.completion.logps])
    if not loop.one_update or not at.agrees or at.step % LOOK_EVERY == 0:
        sampler_N = rollouts.tokens["logp"]
        measure(loop.accelerator, rollouts, ("logp",), lambda batch: (loop.module(batch, temperature),), batches)
        at.agrees = bool((rollouts.tokens["logp"] - sampler_N).abs().max() <= AGREEMENT)
    if loop.reference is not None:
        reference = TokenLogProbs(loop.reference.model)
        measure(loop.accelerator, rollouts, ("ref_logp",), lambda batch: (reference(batch, temperature),), batches)


def _update(loop: Loop, rollouts: Rollouts, step: int) -> dict[str, float]:
    """Passes over a step's completions; the means of what the updates measured."""
    config, meter, norms = loop.config, Meter(), Counter[str]()
    run_B = groups.taught(config, rollouts)
    for epoch in range(config.epochs):
        for members in groups.minibatches(config, rollouts, step, epoch):
            chosen = members[run_B[members]]
            totals = groups.Totals(config, rollouts, members, chosen)
            measured = optimization_step(
                loop.accelerator,
                loop.module,
                loop.optimizer,
                loop.scheduler,
                _share(loop, rollouts, chosen),
                lambda batch, totals=totals: _loss(loop, rollouts, batch, totals, meter),
                loop.clip,
                lambda chosen=chosen: f"step {step + 1}, prompts {sorted({rollouts.samples[i].row['id'] for i in chosen})}",
            )
            norms.update({name: measured[name] for name in loop.clip})
    updates = config.epochs * config.minibatches
    return meter.read(loop.accelerator, updates) | {name: value / updates for name, value in norms.items()}


def _loss(loop: Loop, rollouts: Rollouts, batch: TokenBatch, totals: groups.Totals, meter: Meter) -> torch.Tensor:
    """A micro-batch's share of the minibatch's loss."""
    config, kl, mask_BT = loop.config, loop.config.reference_kl, rollouts.row_mask(batch)
    logp_BT = rollouts.by_row(batch, loop.module(batch, config.sampling.temperature))
    advantages_BT = rollouts.rows("advantages", batch)
    old_logp_BT = logp_BT.detach() if loop.one_update else rollouts.rows("logp", batch)
    low, high = config.clip_low, config.clip_high
    if config.objective == "ranked_pairs":
        loss = groups.ranked_pairs(rollouts, batch, logp_BT, config.pair_beta) / totals.pairs
    else:
        loss = policy_loss(logp_BT, old_logp_BT, advantages_BT, mask_BT, low, high, config.aggregate, totals.mean)
    moved = policy_metrics(logp_BT, old_logp_BT, advantages_BT, mask_BT, low, high)
    meter.top("ratio_max", moved.pop("ratio_max"))
    share = mask_BT.sum() / totals.run
    meter.add({"policy_loss": loss} | {name: mean * share for name, mean in moved.items()})
    if config.reference_kl.penalised_in == "loss":
        ref_logp_BT, off_policy = rollouts.rows("ref_logp", batch), None if loop.one_update else old_logp_BT
        penalty = kl_loss(logp_BT, ref_logp_BT, mask_BT, kl.estimator, off_policy, config.aggregate, totals.mean)
        meter.add({"kl_loss": penalty})
        loss = loss + kl.coefficient * penalty
    return loss


def _share(loop: Loop, rollouts: Rollouts, indices: np.ndarray) -> list[TokenBatch]:
    """This process's micro-batches of some completions; pairs are of one group, which then stays whole."""
    whole, runtime = loop.config.objective == "ranked_pairs", loop.config.runtime
    units = groups.by_group(rollouts, indices) if whole or runtime.share_prompts else indices
    return rollouts.share(loop.accelerator, units, runtime, loop.policy.pad_id, runtime.share_prompts, whole)


def _save(run: Run, loop: Loop, at: Position, parts: Parts, rollouts: Rollouts | None) -> None:
    """A resume state, with the next step's completions when they wait for their update."""

    def write(folder: Path) -> None:
        parts.save(folder)
        if rollouts is not None:
            rollouts.save(folder)

    state.save(run, loop.accelerator, at.step, {"drawn": at.drawn, "agrees": at.agrees}, write)


def _usable(loop: Loop, run: Run, prompts: Path) -> list[Row]:
    """The prompts that can be sampled and rated, in the curriculum's order."""
    config = loop.config
    loop.mixture.check(read_schema(prompts).names, "the prompts")
    given = list(run.rows(prompts))
    for number, row in enumerate(given, start=1):
        loop.mixture.check_row(row, f"prompts row {number}")
    loop.mixture.check_rows(given)
    others = [loop.reference] if loop.reference is not None else []
    rows = usable_prompts(run, prompts, loop.policy, others, config.sampling.max_new_tokens)
    return in_curriculum(run, rows, config.curriculum) if config.curriculum.used else rows


def _prepare(config: GrpoConfig, policy: Path, reference: Path, judges: Mapping[str, Path]) -> Loop:
    """Load the models and check that they fit together. Dropout is off in all of them."""
    accelerator = accelerator_for(config.runtime, config.dtype)
    actor, anchor = load_policy(policy, seed=config.seed), None
    set_threads(config.runtime, count_parameters(actor.model))
    check_log_probs(actor.model, config.runtime.packed, config.runtime.share_prompts)
    if config.reference_kl.coefficient or config.reference_kl.measure:
        anchor = load_policy(reference, seed=config.seed)
        require_same_tokens(actor, reference=anchor)
        anchor.model.to(accelerator.device).eval().requires_grad_(False)  # pyright: ignore[reportArgumentType]
    models = load_judges(config.rewards, judges, accelerator.device)
    mixture = Mixture(config.rewards, model_arguments(models, config.runtime.micro_batch_tokens))

    module = TokenLogProbs(actor.model).eval()
    updates = config.steps * config.epochs * config.minibatches
    optimizer, scheduler = make_optimizer([(config.optimizer, module.parameters())], updates)
    clip = {"grad_norm": (list(module.parameters()), config.optimizer.max_grad_norm)}
    module, optimizer = accelerator.prepare(module, optimizer)
    accelerator.register_for_checkpointing(scheduler)
    return Loop(config, accelerator, actor, anchor, mixture, module, optimizer, scheduler, clip)
