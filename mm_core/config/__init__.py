"""Reading, checking and merging the files and flags of a job. Imports no torch."""

from mm_core._lazy import lazy_exports

_EXPORTS = {
    "ComponentConfig": "mm_core.config.component",
    "ConfigError": "mm_core.config.findings",
    "ConfigReader": "mm_core.config.classic",
    "DataConfig": "mm_core.config.data",
    "Document": "mm_core.config.document",
    "Finding": "mm_core.config.findings",
    "Fsdp2Config": "mm_core.config.fsdp2",
    "GenerationJob": "mm_core.config.generation_job",
    "InferenceConfig": "mm_core.config.inference",
    "Legacy": "mm_core.config.keys",
    "MMConfig": "mm_core.config.classic",
    "ModelConfig": "mm_core.config.model",
    "NoEffect": "mm_core.config.keys",
    "NotYet": "mm_core.config.keys",
    "Only": "mm_core.config.keys",
    "Origin": "mm_core.config.origin",
    "SectionModel": "mm_core.config.section",
    "T2VDatasetConfig": "mm_core.config.dataset",
    "ToolsConfig": "mm_core.config.tools",
    "TrainFlags": "mm_core.config.flags",
    "TrainingJob": "mm_core.config.job",
    "check_file": "mm_core.config.file_check",
    "check_training_job": "mm_core.config.job",
    "get_args": "mm_core.config.args",
    "invalid": "mm_core.config.section",
    "load_generation_job": "mm_core.config.generation_job",
    "load_training_job": "mm_core.config.job",
    "merge_mm_args": "mm_core.config.args",
    "parse_train_flags": "mm_core.config.flag_parsing",
    "read_document": "mm_core.config.document",
    "train_help": "mm_core.config.flag_help",
    "world_size": "mm_core.config.flags",
}

__all__ = sorted(_EXPORTS)
__getattr__, __dir__ = lazy_exports(__name__, _EXPORTS)
