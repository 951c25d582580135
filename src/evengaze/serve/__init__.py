"""An OpenAI-compatible endpoint for a pruned model: requests are queued, and answered in batches as they come."""
