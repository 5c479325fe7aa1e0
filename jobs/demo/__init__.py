"""The whole journey on the generated corpus."""
