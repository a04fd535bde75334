"""Conversations for language and vision-language models: files, chat templates, labels, batches."""
