"""What `mm doctor` says about each kind of problem: what it costs, and how to mend it.

A code is the stable name of a kind. A test compares the table with the codes that the registry's source uses.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Explanation:
    """What a kind of problem costs, and what mends it; `mend` is empty where the message itself says it."""

    why: str
    mend: str = ""


_AUTHORS = "Tell the authors of the distribution; until then, `mm plugin disable {distribution}` silences it"

EXPLANATIONS: dict[str, Explanation] = {
    # found while metadata is read
    "unreadable-path": Explanation(
        "A folder or archive on sys.path cannot be searched; distributions in it are not found.",
        "Check that it can be read, or take it off sys.path (PYTHONPATH, .pth files)",
    ),
    "unreadable-metadata": Explanation(
        "Files in its metadata folder are damaged, so its ids are not found. All other distributions are.",
        "Run: pip install --force-reinstall {distribution}; if pip fails too, delete that folder and install it again",
    ),
    "installed-twice": Explanation(
        "Two copies are on the path and say different things; which of them is meant cannot be known.",
        "Remove the copy that you do not mean",
    ),
    "broken-finder": Explanation(
        "An import hook that some package installed fails when it is asked for distributions; those that it knows are "
        "not found.",
        "Remove or update the package that installed it",
    ),
    "pip-leftover": Explanation(
        "An installation was interrupted; what is left counts as nothing, and confuses other tools.",
        "Delete that folder; if ids are missing, install the plugin again",
    ),
    "missing-source": Explanation(
        "The install only points to a folder of sources, and that folder is gone: none of its ids can be imported.",
        "Run pip install -e FOLDER from where the sources are now, or: pip uninstall {distribution}",
    ),
    "unreadable-origin": Explanation(
        "Everything of it works; only where it was installed from is not known, so a lock cannot say it.",
        "Run: pip install --force-reinstall {distribution}",
    ),
    "byte-order-mark": Explanation(
        "We read the file as it was meant; pip and other tools miss its first section.", _AUTHORS
    ),
    "unreadable-requirement": Explanation(
        "A range that cannot be parsed is not checked: the plugin may be made for another version of the core.",
        _AUTHORS,
    ),
    # found in what is declared
    "misnamed-entry": Explanation("Nobody can ask for an entry of this name or group.", _AUTHORS),
    "declared-twice": Explanation("The id means two things at once, so it cannot be used.", _AUTHORS),
    "reserved-name": Explanation(
        "The name would pass for what a program registers itself, and past every allow list; nothing of it counts.",
        "Give the distribution another name, or remove it",
    ),
    "malformed-target": Explanation(
        "An entry names what to import as package.module:object; this one cannot be imported.", _AUTHORS
    ),
    "unknown-extra": Explanation(
        "The entry asks for an extra that its distribution does not have, so what it needs is not checked.",
        _AUTHORS,
    ),
    "malformed-value": Explanation(
        "The line says something about an id that cannot be understood.", _AUTHORS
    ),
    "alias-is-taken": Explanation(
        "The old id is an id of its own, which wins: asking for it means that.", _AUTHORS
    ),
    "alias-chain": Explanation(
        "Old ids name the newest id, not each other; this one cannot be used.", _AUTHORS
    ),
    "alias-to-nothing": Explanation(
        "The old id stands for an id that does not exist, so it cannot be used.", _AUTHORS
    ),
    "farewell-of-existing": Explanation(
        "The id works; only the note that it was dropped is wrong.", _AUTHORS
    ),
    # selection
    "selected-not-installed": Explanation(
        "A selection names a distribution that is not there, so that line does nothing.",
        "Install the distribution, or correct the line",
    ),
    "preferred-without-claim": Explanation(
        "A selection prefers a distribution for an id that it does not offer, so that line does nothing.",
        "Correct or remove the line",
    ),
    "unreadable-selection": Explanation(
        "A selection file says which plugins take part; while it cannot be read, every command that needs a plugin "
        "refuses to run. This page shows the plugins as if there were no selection.",
    ),
    # an entry's status
    "blocked": Explanation("A selection disables the distribution: its ids are known and refused."),
    "not_allowlisted": Explanation(
        "An allow list leaves the distribution out: its ids are known and refused."
    ),
    "incompatible": Explanation(
        "The plugin says which versions of the core it was made for, and the installed one is none of them."
    ),
    "missing_extra": Explanation(
        "The entry needs an optional part of its distribution that is not installed."
    ),
    "ambiguous": Explanation("Asking for the id is an error until it is said which claim is meant."),
    "shadowed": Explanation(
        "Another claim to the id was chosen; this one is reached as distribution/id only."
    ),
    # found by the doctor: what imports would run into
    "missing-requirement": Explanation(
        "The distribution says that it needs this one; its import is likely to fail without.",
        "Run: pip install '{requirement}'",
    ),
    "outdated-requirement": Explanation(
        "The distribution says that it needs another version; it may fail, or compute something else.",
        "Run: pip install '{requirement}'",
    ),
    "missing-target": Explanation(
        "The entry names a module that is not there: the build left it out, or it was renamed.",
        "Reinstall the distribution, or tell its authors",
    ),
    "syntax-error": Explanation(
        "The module behind the entry is no valid Python for this interpreter, so asking for the id fails.",
        _AUTHORS,
    ),
    # found by the doctor: environment variables
    "environment-variable": Explanation(
        "A wrong value stops whoever reads it, or is taken for another; under a wrong name nobody reads it."
    ),
    # found by the doctor: devices
    "broken-torch-npu": Explanation(
        "torch imports it at once, and diffusers and transformers wherever they find it: nothing that needs torch works."
    ),
    "no-npu": Explanation(
        "Jobs run on another device, or on the CPU.",
        "Check that npu-smi shows the NPUs, that the container was given them, and ASCEND_RT_VISIBLE_DEVICES",
    ),
    "no-torch-npu": Explanation(
        "There are files of NPUs, and torch cannot use them: jobs run on another device, or on the CPU.",
        "Install the torch-npu of your version of torch beside CANN: pip install torch-npu",
    ),
    "cpu-torch": Explanation(
        "There are files of CUDA devices, and this build of torch is for CPUs: jobs run on the CPU.",
        "Install a build of torch for CUDA: https://pytorch.org/get-started/locally",
    ),
    # found by the doctor: what a plugin leaves unsaid
    "no-api-range": Explanation(
        "Nobody can tell whether the plugin fits the installed core; if it does not, it fails in the middle of a run "
        "rather than with a message.",
        "Its authors add {ranges} to the dependencies in its pyproject.toml",
    ),
    "no-config-class": Explanation(
        "The section is checked against the constructor's arguments only: no ranges, no checks between fields, and "
        "defaults are not written into a run's config.json.",
        'Its authors declare {names} in [project.entry-points."mm_core.configs"]',
    ),
    "no-sharding-policy": Explanation(
        "FSDP units are found by structure (lists of equal blocks); nothing says the order in which they run, nor "
        "what to keep gathered.",
        'Its authors declare {names} in [project.entry-points."mm_core.sharding_policies"]',
    ),
}
