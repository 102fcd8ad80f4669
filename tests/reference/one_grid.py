"""The choice of an oracle whose pictures have one grid of tokens each."""

from PIL import Image

from tests.reference import paper


class OneGrid:
    """Subclasses say what the model makes of a picture.

    Attributes:
        depth: output layer, 1-based.
        object_layer: the default one.
    """

    depth: int
    object_layer: int

    def count(self, image: Image.Image) -> int:
        """Tokens of a picture."""
        raise NotImplementedError

    def columns(self, image: Image.Image) -> int:
        """Tokens in a row."""
        raise NotImplementedError

    def scores(self, image: Image.Image, layer: int) -> list[float]:
        """Of every token, in picture order."""
        raise NotImplementedError

    def keep(
        self,
        image: Image.Image,
        *,
        ratio: float | None = None,
        tokens: int | None = None,
        alpha: float = 0.1,
        buffer: str = "cross",
        object_layer: int | None = None,
    ) -> list[int]:
        total = self.count(image)
        keep = min(tokens, total) if tokens else max(1, round((ratio or 1.0) * total))
        return paper.select(
            self.scores(image, object_layer or self.object_layer),
            self.scores(image, self.depth),
            keep=keep,
            alpha=alpha,
            columns=self.columns(image),
            buffer=buffer,
        )
