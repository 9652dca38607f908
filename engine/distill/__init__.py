"""The seed model rewrites the references: prompts, cascade, selection, distilled lines."""
