"""Corrects the variance of the model's output, by numbers that the host gives for each step (VC).

    before:  return y
    after:   return correction[:, 0] + correction[:, 1] · y      each channel; `correction` is the last input

Slots of the output keep y itself: what is extrapolated from them is corrected by the host in the same way.
"""

from dataclasses import dataclass

import torch
from torch import fx

from qc_compiler.compensation import channel_axis, compensate
from qc_compiler.graph import (
    GraphPass,
    Report,
    Skip,
    add_placeholder,
    fake_mode_of,
    inline,
    outputs,
    trace,
    values_of,
)


@dataclass(frozen=True)
class CompensateOutput(GraphPass):
    """Adds the correction; `gm.meta["interface"].num_channels` says how many channels it has."""

    def run(self, gm: fx.GraphModule) -> Report:
        interface = gm.meta.get("interface")
        if interface is None or interface.num_channels is not None:
            return Report(changed=0)
        first, *others = outputs(gm.graph)
        if not isinstance(first, fx.Node) or first.meta["val"].dim() < 3:
            return Report(0, (Skip("output", "it has no channels: VC corrects images, videos and tokens"),))
        value = first.meta["val"]
        channels = int(value.shape[channel_axis(value.dim())])
        with fake_mode_of([value]):
            correction = add_placeholder(gm.graph, "correction", torch.empty(channels, 2, device=value.device))
        end = gm.graph.output_node()
        part = trace(lambda y, c: (compensate(y, c),), *values_of([first, correction]))
        (corrected,) = inline(gm.graph, gm, part, [first, correction], before=end)
        end.args = ((corrected, *others),)
        interface.num_channels = channels
        return Report(changed=1)
