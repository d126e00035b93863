"""What the commands that make and show latents share: their options, what they start from, and how they end."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from hflow_rt.cli.app import Commands, app
from hflow_rt.cli.opening import named, open_session
from hflow_rt.cli.options import (
    PICTURE,
    BackendOption,
    DeviceOption,
    JsonOption,
    LabelOption,
    ModelOption,
    NumberOption,
    SeedOption,
    StdOption,
)
from hflow_rt.cli.terminal import note, print_json, say, say_next, tracked
from hflow_rt.errors import DataError, NoInverse

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from hflow_rt.runtime.session import Session

__all__ = ["LATENTS", "Asked", "Start", "are_latents", "latent_command", "set_by"]

LATENTS = "Latents"  # heading in the help of the commands that look into latents


def set_by(controls: Mapping[str, float], steps: int | None) -> dict[str, Any]:
    """What the options --control and --steps set, as a latents file says it, which decodes by it."""
    return ({"controls": controls} if controls else {}) | ({} if steps is None else {"steps": steps})


def are_latents(paths: Sequence[Path]) -> bool:
    """Whether these are latents files, where they could be images."""
    return all(path.suffix.lower() == ".safetensors" for path in paths)


@dataclass(frozen=True)
class Start:
    """What is looked into: names, pixels `[N, C, R, R]` in [0, 1] and latents of images or samples.

    scores: `[N]` by name, of images, such as log_prob in nats.
    """

    names: list[str]
    pixels: "NDArray[np.float32]"
    latents: "dict[str, NDArray[np.float32]]"
    scores: "Mapping[str, NDArray[np.float32]]" = field(default_factory=dict)


@dataclass(frozen=True)
class Asked:
    """The options that such commands share, as they were given; a command that lacks one has its default."""

    model: ModelOption = None
    output: Path = Path()
    number: NumberOption = 4
    seed: SeedOption = 0
    std: StdOption = None
    label: LabelOption = None
    backend: BackendOption = "onnx"
    device: DeviceOption = "auto"
    json: JsonOption = False

    @property
    def again(self) -> str:
        """What a next command needs to find the model again."""
        return named(self.model, "--model ")

    def open(self, cuda_graph: bool | None = None, view: tuple[int | None, str | None] = (None, None)) -> "Session":
        """The session, named on stderr."""
        return open_session(self.model, self.backend, self.device, self.json, cuda_graph, view)

    def open_for_picture(self) -> "Session":
        """The session, once `output` names a picture."""
        from hflow_rt.runtime.images.pictures import check_picture_name

        check_picture_name(self.output)
        return self.open()

    def check_table(self, session: "Session", columns: int, rows: int) -> None:
        """Raise `DataError` where the picture of a table of so many images would be too large."""
        from hflow_rt.runtime.images.pictures import check_picture_size, table_size

        check_picture_size(self.output, *table_size(columns, rows, session.resolution))

    def check_std(self, samples: bool, instead: str = "omit it") -> None:
        """Raise `DataError`, which says what to do `instead`, for an std where nothing is sampled."""
        if self.std and not samples:
            raise DataError(f"--std is for samples, and these are images; {instead}")

    def start(self, session: "Session", images: Sequence[Path] | None) -> Start:
        """The first `number` of the images, encoded, or as many samples of `seed`. Raises `DataError`."""
        from hflow_rt.limits import check_count
        from hflow_rt.runtime.latents.latent_views import samples

        check_count("the number of images", self.number)
        self.check_std(not images)
        if images:
            return self.encode(session, *self.read(session, images, self.number))
        latents = samples(session, self.number, self.std, self.seed, self.label)
        return Start([f"sample {index}" for index in range(self.number)], session.forward(latents), latents)

    def read(
        self,
        session: "Session",
        images: Sequence[Path],
        limit: int | None = None,
        unused: dict[str, str] | None = None,
    ) -> tuple[list[str], "NDArray[np.float32]"]:
        """As `read_pictures`, for the model; how many images cannot be used is said on stderr. Raises `DataError`."""
        from hflow_rt.runtime.images.reading import read_pictures

        return read_pictures(images, session.resolution, limit, session.conditions, unused, note, session.channels)

    def encode(
        self,
        session: "Session",
        names: list[str],
        pixels: "NDArray[np.float32]",
        conditions: "Mapping[str, NDArray[np.float32]] | None" = None,
        controls: "Mapping[str, float] | None" = None,
        only: str | None = None,
        posterior: bool = False,
    ) -> Start:
        """Images `[N, C, R, R]` in [0, 1] encoded in batches, with progress; conditions: else of their names.

        only, posterior: as of `Session.inverse`.
        """
        from hflow_rt.runtime.latents.round_trips import encoded

        if not session.can("inverse"):  # before a class is missed
            raise NoInverse(session.manifest.absent["inverse"])
        known = self.conditions(session, names) if conditions is None else conditions
        how: dict[str, Any] = {"seed": self.seed, "posterior": posterior, "only": only}
        count = len(pixels)
        found = encoded(session, pixels, known, controls, lambda parts: tracked(parts, count, len, "encoding"), **how)
        return Start(names, pixels, found.latents, found.scores)

    def values(self, session: "Session", files: Sequence[Path], space: str | None = None) -> tuple[str, Start]:
        """What latents files hold and its space, that of the first unless one is named. Raises `DataError`.

        Pixels are as the session decodes them: it should be what `as_made` says of the files.
        """
        from hflow_rt.runtime.latents.files import load_latents
        from hflow_rt.runtime.latents.operations import check_latents, concatenate
        from hflow_rt.runtime.session import LATENT_SPACE

        names: list[str] = []
        parts = []
        for path in files:
            values, about = load_latents(path)
            own = about.get("space", LATENT_SPACE)
            space = own if space is None else space
            if own != space:
                raise DataError(f"{path} is in space {own}, not {space}; choose files of one space")
            check_latents(values, session.space_shapes(space), str(path))
            count = len(next(iter(values.values())))
            names += about.get("images", [f"{path.stem} {index}" for index in range(count)])
            parts.append(values)
        assert space is not None
        found = concatenate(parts)
        return space, Start(names, session.decode(space, found), found)

    def conditions(self, session: "Session", names: Sequence[str]) -> "dict[str, NDArray[np.float32]]":
        """Conditions of the images called `names`: of `label`, or of their folders. Raises `DataError`."""
        from hflow_rt.conditions import by_folder, of_option

        if self.label is not None:
            return of_option(session.conditions, self.label, len(names))
        try:
            return by_folder(session.conditions, names)
        except DataError as error:
            raise DataError(f"{error}; put it there, or say --label") from error

    def save_columns(
        self, names: Sequence[str], columns: "Sequence[NDArray[np.uint8]]", captions: Sequence[str]
    ) -> None:
        """Write a table: a row a name, a column an entry of `columns` `[N, R, R, 3]` with its caption."""
        import numpy as np

        from hflow_rt.runtime.images.pictures import Row, save_image, table

        shown = np.stack(columns, axis=1)
        rows = [Row(row, Path(name).name, captions) for name, row in zip(names, shown, strict=True)]
        save_image(self.output, table(rows))

    def finish(self, report: Mapping[str, Any], lines: Sequence[str], *following: str) -> None:
        """The end: one JSON object, or lines and what is useful next."""
        if self.json:
            print_json({"output": str(self.output), **report})
            return
        for line in lines:
            say(line)
        say_next(*following)


def latent_command(
    output: str,
    *shared: str,
    about: str = PICTURE,
    panel: str | None = LATENTS,
    to: Commands = app,
    model: Any = ModelOption,
    number: int = 4,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register a command whose first argument is an `Asked`, which becomes options: `shared`, and those all have.

    output: its default. about: the help of it. to: the group. model: another annotation. number: its default.
    """
    hints = get_type_hints(Asked, include_extras=True) | {
        "model": model,
        "output": Annotated[Path, typer.Option("-o", "--output", help=about)],
    }
    defaults = {one.name: one.default for one in fields(Asked)} | {"output": Path(output), "number": number}
    names = [name for name in hints if name in (*shared, "model", "output", "backend", "device", "json")]

    def register(function: Callable[..., None]) -> Callable[..., None]:
        _, *own = inspect.signature(function).parameters.values()
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        options = [inspect.Parameter(name, kind, default=defaults[name], annotation=hints[name]) for name in names]

        def run(**values: Any) -> None:
            function(Asked(**{name: values.pop(name) for name in names}), **values)

        run.__name__, run.__doc__, run.__module__ = function.__name__, function.__doc__, function.__module__
        run.__signature__ = inspect.Signature([*own, *options])  # type: ignore[attr-defined]
        run.__annotations__ = {one.name: one.annotation for one in (*own, *options)}
        to.command(rich_help_panel=panel)(run)
        return function

    return register
