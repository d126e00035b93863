"""The family of the docs with one channel."""

from dataclasses import replace

from family_of_the_docs import FAMILY as COLOUR

FAMILY = replace(
    COLOUR, name="grey", title="a grey toy", presets={}, tiny={**COLOUR.tiny, "model": {"channels": 1, "resolution": 8}}
)
