"""Copy a shipped configuration into the current folder.

    lighthouse init --list
    lighthouse init debug
    lighthouse train debug.toml

Paths in the copy are relative to the folder from which training is started. Most configurations
use the byte tokenizer and the source code of Python's standard library, which work in any folder.
"""

from pathlib import Path

from lighthouse_cli.parser import Parser, did_you_mean, exit_on_value_error


def main() -> None:
    parser = Parser(__doc__)
    parser.add_argument("name", metavar="NAME", nargs="?", help="of a configuration, as debug")
    parser.add_argument("--list", action="store_true", help="list the configurations")
    options = parser.parse_args()
    if (options.name is None) != options.list:
        parser.error("give NAME or --list, one of them")
    if options.list:
        for name, path in shipped().items():
            print(f"{name:<22}{first_line(path)}")
        return
    with exit_on_value_error():
        print(copy(options.name, Path.cwd()))


def shipped() -> dict[str, Path]:
    """The shipped configurations by name."""
    here = Path(__file__).parent
    # In a wheel the folder is inside this package, in a checkout next to it.
    folders = (here / "train_configs", here.parent / "train_configs")
    folder = next(folder for folder in folders if folder.is_dir())
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def first_line(path: Path) -> str:
    """The first line of the header of a configuration."""
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


def copy(name: str, folder: Path) -> Path:
    """Copy the configuration `name` into `folder` and return its path there.

    Raises:
        ValueError: there is no such configuration, or the file already exists.
    """
    configs = shipped()
    source = configs.get(name.removesuffix(".toml"))
    if source is None:
        remedy = did_you_mean(name, configs, "choose one")
        raise ValueError(f"NAME must be one of {', '.join(configs)}, got {name!r}; {remedy}")
    target = folder / source.name
    try:
        # This fails for any existing name, also for a link to nowhere.
        with target.open("xb") as file:
            file.write(source.read_bytes())
    except FileExistsError:
        raise ValueError(
            f"NAME must be a configuration that is not here yet, got {name!r}, and {target} "
            "exists; move that file away"
        ) from None
    return target
