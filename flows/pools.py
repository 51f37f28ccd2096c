"""Which work pool runs a stage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field, create_model

from stages.specs import STAGES, Config

HERE = "left empty: here, in the pipeline's own process"


class StagePools(Config):
    """Where stages run: the work pools, such as cpu or gpu, that take them from the pipeline."""

    default: str | None = Field(
        default=None, title="default", description=f"The work pool of every stage that has none of its own; {HERE}."
    )

    def of(self, stage: str) -> str | None:
        """The pool of a stage, or None for the pipeline's own process."""
        return getattr(self, stage) or self.default or None


def _pool(stage: str) -> Any:
    about = f"The work pool that runs this stage, e.g. cpu or gpu; left empty: `default`, else {HERE.partition(': ')[2]}."
    return str | None, Field(default=None, title=stage, description=about)


if TYPE_CHECKING:
    Pools = StagePools
else:
    Pools = create_model("Pools", __base__=StagePools, __doc__=StagePools.__doc__, **{stage: _pool(stage) for stage in STAGES})
