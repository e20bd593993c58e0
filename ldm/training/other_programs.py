"""Options of other training programs, and what to give to main.py in their place. Imports no torch."""

from __future__ import annotations

from ldm.moved_targets import LEARNT_WORD, LORA

_IMAGES = "images and captions are pre-encoded by tools/preencode.py --images, or read by train_from_images.yaml"
_PRIOR = "images of the class go into a prior: tools/make_prior.py --prompt, and --base ... prior_images.yaml"
_RELEASE = "give --finetune_from RELEASE, a file or a folder of diffusers, or hack it with tools/hack_weights.py"
_SCHEDULE = "describe a schedule of ldm.lr_scheduler or torch.optim.lr_scheduler in model.params.scheduler_config"
_RATE = "set model.base_learning_rate=RATE, and --scale_lr False to take it as it is"
_BATCH = "set data.params.batch_size=N"
_STEPS = "give --max_steps N"
_EPOCHS = "give --max_epochs N"
_SAVE = "set lightning.modelcheckpoint.params.every_n_train_steps=N"
_FOLDER = "run folders are made in --logdir"
_EIGHT_BIT = "give --base ... lean.yaml, whose optimizer stores 8-bit moments"
_CHECKPOINTED = "set model.params.unet_config.params.use_checkpoint=True"
_ATTENTION = "torch's own attention is used, and needs no option"
_NOISE = "set model.params.noise_config, with a class of ldm.models.diffusion.noise"
_LOGGER = "describe a logger in lightning.logger, with target and params"
_CONFIG = "give a YAML config of this project with --base"
_SIZE = "the size is that of the encoded images: tools/preencode.py --size N"
_PREVIEWS = "give --previews FILE, a text file with a prompt per line"
_INTERVAL = "set lightning.previews.every_n_train_steps=N"
_ENCODER = "give --base ... train_text_encoder.yaml"
_ENCODER_RATE = f"{_ENCODER}, and set model.params.trained_parts.rate_factors.cond_stage_model, a share of the rate"
_ENCODER_STEPS = f"{_ENCODER}, and set model.params.trained_parts.until_step.cond_stage_model=STEPS"
_TAGS = "tools/preencode.py has --tag-variants, --keep-tags and --tag-dropout"
_REPEATS = "give a set a weight: data.params.training_urls=[{urls: SHARDS, weight: N}]"
_CAPTIONS = "tools/preencode.py has --max-tokens and --clip-skip, and training follows the shards"
_V = "give --base ... finetune_stable_diffusion_v2_768_v.yaml"

# Options of diffusers' scripts, kohya's sd-scripts, EveryDream and forks for DreamBooth, in alphabetical order.
_INSTEAD = {
    "adam_beta1": "set model.params.optimizer_config.params.betas",
    "adam_weight_decay": "set model.params.optimizer_config.params.weight_decay",
    "batch_size": _BATCH,
    "caption_column": _IMAGES,
    "caption_extension": _IMAGES,
    "caption_tag_dropout_rate": _TAGS,
    "center_crop": "tools/preencode.py crops images",
    "checkpointing_steps": _SAVE,
    "checkpoints_total_limit": "set lightning.modelcheckpoint.params.save_last_k=N",
    "ckpt_every_n_minutes": "set lightning.modelcheckpoint.params.train_time_interval=MINUTES",
    "class_data_dir": _PRIOR,
    "class_prompt": _PRIOR,
    "class_word": _PRIOR,
    "clip_skip": _CAPTIONS,
    "config": _CONFIG,
    "config_file": _CONFIG,
    "dataset_config": _CONFIG,
    "dataset_name": "nothing is downloaded; " + _IMAGES,
    "dataset_repeats": _REPEATS,
    "ema_decay": "set model.params.use_ema=True, whose decay is 0.9999",
    "enable_bucket": "tools/preencode.py has --buckets",
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "epochs": _EPOCHS,
    "gradient_accumulation_steps": "give --accumulate_grad_batches N",
    "gradient_checkpointing": _CHECKPOINTED,
    "image_column": _IMAGES,
    "initializer_token": LEARNT_WORD,
    "instance_data_dir": _IMAGES,
    "instance_prompt": "a caption is a text file beside each image",
    "keep_tokens": _TAGS,
    "learnable_property": LEARNT_WORD,
    "learning_rate": _RATE,
    "logging_dir": _FOLDER,
    "lora_rank": LORA,
    "lr": _RATE,
    "lr_scheduler": _SCHEDULE,
    "lr_warmup_steps": _SCHEDULE,
    "max_grad_norm": "give --gradient_clip_val N",
    "max_token_length": _CAPTIONS,
    "max_train_epochs": _EPOCHS,
    "max_train_steps": _STEPS,
    "min_snr_gamma": "set model.params.min_snr_gamma=N",
    "mixed_precision": "give --precision bf16-mixed, or 16-mixed",
    "network_alpha": LORA,
    "network_dim": LORA,
    "network_module": LORA,
    "noise_offset": _NOISE,
    "num_class_images": _PRIOR,
    "num_gpus": "give --gpus 0, or the numbers of several GPUs",
    "num_train_epochs": _EPOCHS,
    "optimizer_type": "describe an optimizer in model.params.optimizer_config, with target and params",
    "output_dir": _FOLDER,
    "output_name": "give --name",
    "placeholder_token": LEARNT_WORD,
    "pretrained_model_name_or_path": _RELEASE,
    "pretrained_vae_model_name_or_path": "set model.params.first_stage_config.params.ckpt_path",
    "prior_loss_weight": "set model.params.prior_loss_weight=N",
    "project_name": "give --name, or --project for Weights & Biases",
    "random_flip": "tools/preencode.py has --flip",
    "rank": LORA,
    "reg_data_dir": _PRIOR,
    "reg_data_root": _PRIOR,
    "report_to": _LOGGER,
    "resolution": _SIZE,
    "resume_ckpt": _RELEASE,
    "sample_every_n_epochs": _INTERVAL,
    "sample_every_n_steps": _INTERVAL,
    "sample_prompts": _PREVIEWS,
    "save_every_n_epochs": "set lightning.modelcheckpoint.params.every_n_epochs=N",
    "save_every_n_steps": _SAVE,
    "save_model_as": "tools/merge_release.py writes what the name of --out says",
    "save_steps": _SAVE,
    "shuffle_caption": _TAGS,
    "snr_gamma": "set model.params.min_snr_gamma=N",
    "stop_text_encoder_training": _ENCODER_STEPS,
    "text_encoder_lr": _ENCODER_RATE,
    "token": LEARNT_WORD,
    "train_batch_size": _BATCH,
    "train_data_dir": _IMAGES,
    "train_text_encoder": _ENCODER,
    "train_text_encoder_frac": _ENCODER_STEPS,
    "ucg": "set data.params.null_cond_dropout=SHARE",
    "use_8bit_adam": _EIGHT_BIT,
    "use_ema": "set model.params.use_ema=True",
    "v2": "give --base ... finetune_stable_diffusion_v2_base.yaml",
    "v_parameterization": _V,
    "vae": "set model.params.first_stage_config.params.ckpt_path",
    "validation_prompt": _PREVIEWS,
    "validation_steps": _INTERVAL,
    "with_prior_preservation": _PRIOR,
    "xformers": _ATTENTION,
}


def instead_of(option: str) -> str:
    """Return a hint, such as `"; give --max_steps N"`, for an option of other programs, else an empty string."""
    return f"; {_INSTEAD[option]}" if option in _INSTEAD else ""
