"""Training slender multi-exit models: teacher, slenderisation, distillation exit to exit."""
