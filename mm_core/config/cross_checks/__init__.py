"""Checks between sections and files of a job. Cheap: nothing is opened but a `config.json` beside weights and the
data files, as far as they are small.
"""

from mm_core.config.cross_checks.boundaries import check_experts
from mm_core.config.cross_checks.channels import check_channels
from mm_core.config.cross_checks.chats import check_sequence_length
from mm_core.config.cross_checks.conditions import check_conditions
from mm_core.config.cross_checks.data_files import check_data_files
from mm_core.config.cross_checks.encoding import check_encode_ahead
from mm_core.config.cross_checks.features import check_features, is_loaded
from mm_core.config.cross_checks.groups import check_groups
from mm_core.config.cross_checks.layers import check_layers
from mm_core.config.cross_checks.paths import check_folders, check_load, check_path, missing_path
from mm_core.config.cross_checks.ranks import check_ranks
from mm_core.config.cross_checks.samplers import check_sampler
from mm_core.config.cross_checks.sizes import check_clip_size, check_video_size
from mm_core.config.cross_checks.text import check_text
from mm_core.config.cross_checks.validation import check_validation
from mm_core.config.cross_checks.weights import check_weights

__all__ = [
    "check_channels",
    "check_clip_size",
    "check_conditions",
    "check_data_files",
    "check_encode_ahead",
    "check_experts",
    "check_features",
    "check_folders",
    "check_groups",
    "check_layers",
    "check_load",
    "check_path",
    "check_ranks",
    "check_sampler",
    "check_sequence_length",
    "check_text",
    "check_validation",
    "check_video_size",
    "check_weights",
    "is_loaded",
    "missing_path",
]
