"""Finished runs on disk: keyed by their setting, written in one step, checksummed, nothing executable.

A run is two files: `NAME-KEY.json`, its data, and `NAME-KEY.npz`, its weights. The JSON file names the weights' hash and has one of
its own over everything else it says; it is written last, so that a run is there whole or not at all.
"""

import contextlib
import hashlib
import io
import json
import os
import sys
import tempfile
from pathlib import Path

import numpy as np

FORMAT = 1
FIELDS = {"format": int, "setting": dict, "curve": list, "accuracy": list, "opening": list, "seconds": dict, "provenance": dict, "weights": dict, "sha256": str}


class Damaged(Exception):
    """A stored run that is not what it says; the message says why."""


def key(setting):
    """The key of a run: the hash of its setting, a dict of plain values, and of nothing else."""
    return hashlib.sha256(canonical(setting)).hexdigest()[:16]


def canonical(data):
    """The one JSON text of some plain data, as bytes. Raises ValueError for NaN and infinities, TypeError for what is not plain."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def name(setting):
    """The file name of a run without its ending: readable letters, then the key."""
    return "{model}-d{d}-M{M}-tau{tau}-{norm}-{rate:g}-seed{seed}-".format(**setting) + key(setting)


def write(path, data):
    """Put bytes at `path` in one step; a part file never stays."""
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        with open(part, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def pack(weights):
    """Named arrays as the bytes of an .npz file, which has no pickle in it; equal arrays give equal bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **{name: np.ascontiguousarray(array) for name, array in sorted(weights.items())})
    return buffer.getvalue()


def checked(data):
    """The data of a JSON file, after its form and its own hash are checked; raises Damaged."""
    try:
        entry = json.loads(data)
    except ValueError as error:
        raise Damaged(f"no JSON ({error})") from None
    if not isinstance(entry, dict) or set(entry) != set(FIELDS) or not all(isinstance(entry[field], kind) for field, kind in FIELDS.items()):
        raise Damaged("not the fields of a run")
    if entry["format"] != FORMAT:
        raise Damaged(f"format {entry['format']}, this code reads {FORMAT}")
    if hashlib.sha256(canonical({k: v for k, v in entry.items() if k != "sha256"})).hexdigest() != entry["sha256"]:
        raise Damaged("its data do not have the hash that it names")
    return entry


def read(path):
    """The run whose JSON file is at `path`, a dict with `weights` as arrays. Raises Damaged where a byte of either file is not as written."""
    entry = checked(path.read_bytes())
    if path.stem != name(entry["setting"]):
        raise Damaged(f"it holds the run {name(entry['setting'])}")
    try:
        data = path.with_suffix(".npz").read_bytes()
    except FileNotFoundError:
        raise Damaged("its weights are missing") from None
    if hashlib.sha256(data).hexdigest() != entry["weights"]["sha256"]:
        raise Damaged("its weights do not have the hash that it names")
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        weights = {name: arrays[name] for name in arrays.files}
    return entry | {"weights": weights}


class Store:
    """Runs in a folder, to which new ones go, and in `others`, which are only read.

    Raises ValueError for an empty name and NotADirectoryError for a file in a folder's place, before anything is written.
    """

    def __init__(self, folder, *others, say=lambda text: print(text, file=sys.stderr)):
        for place in (folder, *others):
            if not str(place):
                raise ValueError("store='': the name of a folder is needed")
            if Path(place).exists() and not Path(place).is_dir():
                raise NotADirectoryError(f"store={str(place)!r}: this is a file, the name of a folder is needed")
        self.folder, *self.others = (Path(place).resolve() for place in (folder, *others))
        self.say = say

    def get(self, setting):
        """The finished run of a setting, or None. A damaged one is named, set aside under a name of its own and not used."""
        for folder in (self.folder, *self.others):
            path = folder / f"{name(setting)}.json"
            if path.exists():
                try:
                    return read(path)
                except Damaged as damage:
                    self.say(f"{path}: {damage}; {self.set_aside(path)}")
        return None

    def set_aside(self, path):
        """Move both files of a damaged run to names that overwrite nothing; returns what was done, in words."""
        number = next(n for n in range(1, 10**6) if not path.with_suffix(f".broken-{n}.json").exists())
        try:
            path.rename(path.with_suffix(f".broken-{number}.json"))
            with contextlib.suppress(FileNotFoundError):
                path.with_suffix(".npz").rename(path.with_suffix(f".broken-{number}.npz"))
        except OSError as error:
            return f"it is not used and could not be moved ({error.strerror})"
        return f"kept as {path.stem}.broken-{number}.json, the run is to be made again"

    def put(self, setting, weights, **data):
        """Write a finished run: `weights`, named arrays, and the other FIELDS. Returns the path of its JSON file."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name(setting)}.json"
        packed = pack(weights)
        entry = {"format": FORMAT, "setting": setting, "weights": {"sha256": hashlib.sha256(packed).hexdigest()}} | data
        entry = json.loads(canonical(entry))  # tuples become lists before the hash is taken, as a reader sees them
        entry["sha256"] = hashlib.sha256(canonical(entry)).hexdigest()
        write(path.with_suffix(".npz"), packed)
        lines = (f" {json.dumps(field)}: {json.dumps(entry[field])}" for field in FIELDS)
        write(path, ("{\n" + ",\n".join(lines) + "\n}\n").encode())
        return path

    def ready(self):
        """Make the folder and sweep it. Raises OSError where nothing can be written, before a run is trained for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.folder):
            self.sweep()

    def sweep(self):
        """Remove the part files that dead processes of this machine have left in the folder."""
        for part in self.folder.glob(".part-*"):
            number = int(part.name.split("-")[1])
            try:
                os.kill(number, 0)
            except ProcessLookupError:
                part.unlink(missing_ok=True)
            except PermissionError:  # alive, another user's
                pass

    def entries(self):
        """The paths of all runs, the newer folder's first, each key once."""
        paths = {path.name: path for folder in (*self.others[::-1], self.folder) for path in sorted(folder.glob("*.json")) if ".broken-" not in path.name}
        return [paths[name] for name in sorted(paths)]
