"""Outlier channels put into the weights, for studies of number formats."""

import dataclasses
from typing import ClassVar

from deepseek_jax.errors import ConfigError
from deepseek_jax.stages.base import Stage, Variables
from deepseek_jax.training.outliers import add_outliers


@dataclasses.dataclass(frozen=True)
class OutliersStage(Stage):
    """Puts outlier channels into the weights; leaves no files."""

    channels: int
    factor: float

    leaves_results: ClassVar[bool] = False

    def __post_init__(self):
        width = self.experiment.model.config.hidden_size
        if not 0 < self.channels <= width or self.factor <= 0:
            raise ConfigError(f"channels={self.channels} must be 1 to {width}, and factor={self.factor} above 0")

    def summary(self) -> str:
        return f"{self.channels} channels {self.factor:g} times as large"

    def run(self, variables: Variables | None) -> Variables:
        variables = self.initial_weights(variables)
        return {**variables, "params": add_outliers(variables["params"], self.channels, self.factor)}
