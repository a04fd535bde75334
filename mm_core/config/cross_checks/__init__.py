"""Checks between sections and files of a job. Cheap: nothing is opened but a `config.json` beside weights and the
data files, as far as they are small.
"""

from mm_core.config.cross_checks.boundaries import check_experts
from mm_core.config.cross_checks.channels import check_channels
from mm_core.config.cross_checks.chats import check_sequence_length
from mm_core.config.cross_checks.data_files import check_data_files
from mm_core.config.cross_checks.layers import check_layers
from mm_core.config.cross_checks.paths import check_folders, check_load, check_path, missing_path
from mm_core.config.cross_checks.ranks import check_ranks
from mm_core.config.cross_checks.sizes import check_clip_size, check_video_size
from mm_core.config.cross_checks.text import check_text
from mm_core.config.cross_checks.validation import check_validation
from mm_core.config.cross_checks.weights import check_weights

__all__ = [
    "check_channels",
    "check_clip_size",
    "check_data_files",
    "check_experts",
    "check_folders",
    "check_layers",
    "check_load",
    "check_path",
    "check_ranks",
    "check_sequence_length",
    "check_text",
    "check_validation",
    "check_video_size",
    "check_weights",
    "missing_path",
]
