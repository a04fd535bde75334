"""Where an installed distribution came from, as direct_url.json (PEP 610) tells."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Mapping

# What such a URL means needs no urllib, whose import costs more than the rest of discovery.
_SIMPLE_FILE = re.compile(r"file://(/[A-Za-z0-9_./+@=~-]*)")


def origin_of(direct_url: str | None, location: str, *, is_egg: bool) -> tuple[bool, str, str]:
    """Return (editable, origin, path), as `EntrySpec` describes them.

    Args:
        direct_url: the text of direct_url.json, which installs from an index do not have.
        location: the folder that holds the metadata folder.
        is_egg: whether that is an egg-info folder.

    Raises:
        ValueError, TypeError, AttributeError, KeyError: the text is not what PEP 610 prescribes.
    """
    if direct_url is None:
        return (False, f"source {location}", location) if is_egg else (False, "wheel", location)
    data = json.loads(direct_url)
    where = place_of(data["url"])
    if "dir_info" in data:
        if data["dir_info"].get("editable"):
            return True, f"editable {where}", where
        return False, f"local {where}", location
    if "vcs_info" in data:
        vcs = data["vcs_info"]
        return False, f"{vcs['vcs']}+{where}@{vcs.get('commit_id', '')[:12]}", location
    return False, f"{'wheel' if where.endswith('.whl') else 'archive'} {where}", location


def place_of(url: str) -> str:
    """The path of a file URL, any other URL without its password."""
    match = _SIMPLE_FILE.fullmatch(url)
    if match and sys.platform != "win32":
        return match[1]
    from urllib.parse import unquote, urlsplit, urlunsplit

    parts = urlsplit(url)
    if parts.scheme != "file":
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    if sys.platform == "win32":
        from urllib.request import url2pathname

        return url2pathname(parts.path)
    return unquote(parts.path)


def linked_source(egg_links: Mapping[str, str], name: str, location: str) -> bool:
    """Whether `setup.py develop` installed the source folder `location`: a `name.egg-link` points to it.

    Args:
        egg_links: path of each egg-link on the path, by canonical name.
    """
    link = egg_links.get(name)
    if link is None:
        return False
    try:
        with open(link, encoding="utf-8") as file:
            folder = file.readline().strip()
        return os.path.samefile(os.path.join(os.path.dirname(link), folder), location)
    except (OSError, ValueError):
        return False
