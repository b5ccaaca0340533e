"""Tells transformers' Auto classes, and with them its pipelines, about Foveate's classes."""

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from foveate.config import FoveateConfig
from foveate.modeling import FoveateForConditionalGeneration
from foveate.processing import FoveateImageProcessor, FoveateProcessor

AutoConfig.register("foveate", FoveateConfig)
AutoModelForImageTextToText.register(FoveateConfig, FoveateForConditionalGeneration)
AutoImageProcessor.register(FoveateConfig, image_processor_classes={"pil": FoveateImageProcessor})
AutoProcessor.register(FoveateConfig, FoveateProcessor)
