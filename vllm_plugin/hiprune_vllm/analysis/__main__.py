"""`python -m hiprune_vllm.analysis CHECKPOINT IMAGES`: where a vision encoder looks."""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MISSING = "the analysis needs its plotting libraries: pip install 'hiprune-vllm[analysis]'"
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
_SHOWN = 6  # pictures whose attention maps are drawn
_COLUMNS = 16  # attention maps in a row, at most


def main(argv: Sequence[str] | None = None) -> int:
    """Analyses a checkpoint; returns 0, or 2 with a message where that cannot be done."""
    given = _arguments(argv)
    try:
        import matplotlib  # noqa: F401, PLC0415
        import sklearn  # noqa: F401, PLC0415
    except ImportError:
        print(f"error: {MISSING}", file=sys.stderr)
        return 2
    try:
        _analyse(given)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m hiprune_vllm.analysis", description=__doc__)
    parser.add_argument("checkpoint", help="folder or hub name of a vision encoder or a VLM")
    parser.add_argument("images", nargs="+", type=Path, help="pictures, or folders of pictures")
    parser.add_argument("--masks", type=Path, help="folder of PNGs named like the pictures")
    parser.add_argument("--out", type=Path, default=Path("analysis"), help="folder to write to")
    parser.add_argument("--limit", type=int, default=100, help="pictures at most")
    parser.add_argument("--top", type=float, default=0.1, help="share that is highly attended")
    parser.add_argument("--seed", type=int, default=0, help="of the t-SNE")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args(argv)
    if given.limit < 1:
        parser.error(f"--limit must be at least 1, got {given.limit}")
    if not 0 < given.top < 1:
        parser.error(f"--top must be between 0 and 1, got {given.top}")
    return given


def find_pictures(places: Sequence[Path], limit: int) -> list[Path]:
    """Files of pictures, those of a folder by name.

    Raises:
        ValueError: there is none, or a place does not exist.
    """
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(p for p in place.iterdir() if p.suffix.lower() in _SUFFIXES)
        elif place.is_file():
            found.append(place)
        else:
            raise ValueError(f"{place} does not exist")
    if not found:
        raise ValueError(f"no pictures in {', '.join(map(str, places))}")
    return found[:limit]


def opened(path: Path) -> Any:
    """The picture, RGB.

    Raises:
        ValueError: it cannot be read.
    """
    from PIL import Image, UnidentifiedImageError  # noqa: PLC0415

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"{path} is not a readable picture ({error})") from None


def _analyse(given: argparse.Namespace) -> None:
    import numpy as np  # noqa: PLC0415

    from hiprune_vllm.analysis import measure, report  # noqa: PLC0415
    from hiprune_vllm.analysis.encoders import Encoder  # noqa: PLC0415

    paths = find_pictures(given.images, given.limit)
    masks = _masks(given.masks, paths) if given.masks else []
    encoder = Encoder(given.checkpoint, device=given.device)
    scores, similarity, spread, overlaps, chance = [], [], [], [], []
    for number, path in enumerate(paths):
        _say(f"\r{number + 1} of {len(paths)}  {path.name[:40]:40}", end="")
        picture = opened(path)
        seen = encoder.view(picture).scores
        scores.append(seen)
        similarity.append(measure.rank_similarity(seen))
        spread.append(measure.dispersion(seen, given.top))
        if masks:
            mask = opened(masks[number])
            if mask.size != picture.size:
                raise ValueError(
                    f"{masks[number]} must be as large as its picture, {picture.size}: {mask.size}"
                )
            covered = encoder.coverage(mask)
            overlaps.append(measure.overlap(seen, covered, given.top))
            chance.append((covered >= measure.COVERED).mean())
    _say("\ndrawing")
    spreads = np.stack(spread)
    default = encoder.default_object_layer
    proposal = (
        measure.propose_by_overlap(np.stack(overlaps), np.array(chance), default)
        if masks
        else measure.propose_by_dispersion(spreads, default)
    )
    given.out.mkdir(parents=True, exist_ok=True)
    layers = list(range(1, encoder.output_layer + 1))[:: 1 + (encoder.output_layer - 1) // _COLUMNS]
    report.attention_maps(
        given.out / "attention.png",
        [opened(path) for path in paths[:_SHOWN]],
        scores[:_SHOWN],
        layers,
    )
    mean_similarity = np.mean(similarity, axis=0)
    report.similarity_map(given.out / "similarity.png", mean_similarity)
    report.layer_plot(given.out / "dispersion.png", spreads, "dispersion of top tokens",
                      reference=1.0, proposed=proposal.layer)  # fmt: skip
    plots = [
        ("attention.png", "Attention received by each patch, layer by layer (bright: much)."),
        ("similarity.png", "Similarity of the patches' ranks between layers, mean over pictures."),
        ("dispersion.png", "Mean distance between the most attended patches; 1 is random."),
    ]
    grid = Counter(one.shape for one in scores).most_common(1)[0][0]
    same = np.stack([measure.ranks(one) for one in scores if one.shape == grid])
    if same.shape[0] * same.shape[1] > 3:
        report.rank_map(given.out / "ranks.png", same, given.seed)
        plots.append(("ranks.png", "t-SNE of the patches' ranks; near dots rank patches alike."))
    numbers: dict[str, Any] = {
        "checkpoint": str(given.checkpoint),
        "kind": encoder.kind,
        "depth": encoder.depth,
        "output_layer": encoder.output_layer,
        "pictures": len(paths),
        "top": given.top,
        "default_object_layer": default,
        "proposal": {"layer": proposal.layer, "sure": proposal.sure, "reason": proposal.reason},
        "dispersion": spreads.mean(0).tolist(),
        "deep_section_begins": measure.sections(spreads.mean(0).tolist()),
        "rank_similarity": mean_similarity.tolist(),
    }
    if masks:
        hits = np.stack(overlaps)
        numbers |= {"overlap": hits.mean(0).tolist(), "chance": float(np.mean(chance))}
        report.layer_plot(given.out / "overlap.png", hits, "top tokens on objects",
                          reference=float(np.mean(chance)), proposed=proposal.layer)  # fmt: skip
        plots.append(("overlap.png", f"Share of the top {given.top:.0%} patches on objects."))
    report.write(given.out, numbers, plots)
    _say(
        f"object layer {proposal.layer}{'' if proposal.sure else ' (not sure)'}: {proposal.reason}"
    )
    _say(f"wrote {given.out / 'report.html'}")


def _masks(folder: Path, pictures: Sequence[Path]) -> list[Path]:
    masks = [folder / f"{path.stem}.png" for path in pictures]
    missing = [mask for mask in masks if not mask.is_file()]
    if missing:
        raise ValueError(f"every picture needs a mask, missing {missing[0]}")
    return masks


def _say(text: str, end: str = "\n") -> None:
    print(text, end=end, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
