"""What a router looks at: the token, its sentence, or an id that the user gives."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field

from moegen.arch.routing.ids import IdName, named
from moegen.arch.routing.routed import Site
from moegen.arch.setting import Setting
from moegen.graph.builder import Builder
from moegen.ops.sequences import sequence_mean
from moegen.spec.element import Kinds


class RouterInput(Kinds):
    """The vectors that are scored; experts compute on the tokens whatever the router sees."""

    default_kind: ClassVar[str | None] = "token"
    causal: ClassVar[bool] = True

    def ids(self) -> tuple[str, ...]:
        """Names of the ids that it reads."""
        return ()

    def seen(self, b: Builder, tokens: Any, site: Site) -> Any:
        """Vectors [T, d] for tokens [T, d]."""
        return tokens


class TokenInput(RouterInput):
    """Each token by itself."""

    kind: Literal["token"] = "token"

    def says(self, setting: Setting) -> Iterator[str]:
        """What is seen."""
        yield f"The router sees each token by itself, {setting.width:,} numbers."


class SentenceInput(RouterInput):
    """The mean of the sequence's real tokens, so that they all meet the same experts.

    Kudugunta et al. 2021 (arXiv:2110.03742). Not causal: the mean is over later tokens too.
    """

    kind: Literal["sentence"] = "sentence"
    causal: ClassVar[bool] = False

    def says(self, setting: Setting) -> Iterator[str]:
        """What is seen."""
        mean = f"the mean of its {setting.whole}'s real tokens"
        yield f"The router sees {mean} in place of each token."

    def seen(self, b: Builder, tokens: Any, site: Site) -> Any:
        """The same vector for all tokens of a sequence."""
        batch, _ = site.sequences
        return sequence_mean(tokens, site.valid, batch)


class IdInput(RouterInput):
    """A learned vector for each id, such as a task or a language (Kudugunta et al. 2021).

    What is routed is then known before a token is computed, so that the experts of one task can
    be served alone.
    """

    shorthand = "id"

    kind: Literal["id"] = "id"
    id: IdName = Field(
        description="name of the ids that forward is given; token: its own", examples=["task"]
    )
    count: int = Field(ge=1, le=10**6, description="how many ids there are", examples=[3])

    def ids(self) -> tuple[str, ...]:
        """The one it is named after."""
        return (self.id,)

    def says(self, setting: Setting) -> Iterator[str]:
        """What is seen."""
        vector = f"a learned vector of the token's {named(self.id)}, one of {self.count:,}"
        yield f"The router sees {vector}, and not the token."

    def seen(self, b: Builder, tokens: Any, site: Site) -> Any:
        """The vector of each token's id."""
        width = b.width
        table = b.param(f"{self.id}_embedding", self.count, width, role="router")
        return F.embedding(site.ids[self.id], table)
