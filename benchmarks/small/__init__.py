"""Model files of small transformers, as cp-convert takes them; eight heads, few blocks."""
