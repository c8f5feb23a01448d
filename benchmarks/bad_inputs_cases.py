# Copyright 2026 The diffusers-vrpo team. Licensed under the Apache License, Version 2.0.
"""The bad inputs of bad_inputs.py, one per line, by command.

A line has the options that the case changes, a regular expression for what the last line of the output must name, and changes
of files beforehand (`change` in bad_inputs_files.py). `~--name` removes an option of the base.
"""

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A bad input.

    Attributes:
        command: a command of `vrpo`, or `python`.
        changes: options that replace those of `BASES`; for `python`, an expression.
        names: a regular expression that the last line must match.
        given: changes of files.
        expected: `sentence`, or `warned` if the command should work with a warning that matches `names`.
        item: a word for what the case is about.
        may_write: whether the command may change existing files if it works.
    """

    command: str
    changes: str
    names: str
    given: tuple[str, ...] = ()
    expected: str = "sentence"
    item: str = "options"
    may_write: bool = False

    def __str__(self):
        return f"{self.command} {self.changes}" + (f"   [{'; '.join(self.given)}]" if self.given else "")


BASES = {
    "train": "--output_dir out --dataset_name digits --resolution 8 --vae none --model_config model.json --encoder digits "
    "--projector_dim 32 --train_batch_size 16 --max_train_steps 1 --logging_steps 1 --num_inference_steps 1 "
    "--num_validation_images 1 --dataloader_num_workers 0 --report_to none",
    "prepare": "--train_data_dir images --vae vae --resolution 8 --output_dir out --dataloader_num_workers 0",
    "sample": "pipe --num_images 2 --num_inference_steps 2 --batch_size 2 --output_dir out",
    "evaluate": "flat --reference flat2 --encoder encoder --dataloader_num_workers 0 --reference_cache statistics",
    "probe": "pipe --dataset_name digits --num_train 40 --num_test 20 --timesteps 0.5 --dataloader_num_workers 0",
    "layers": "pipe --dataset_name digits --encoder digits --num_train 40 --num_test 20 --timesteps 0.5 --dataloader_num_workers 0",
    "convert": "official.pt out --vae none --num_attention_heads 2",
    "push": "run --hub_model_id me/x",
    "report": "run --output_dir out --metric loss_fm",
    "plan": "--preset SiT-S/4 --vae none --resolution 8 --objective none --train_batch_size 2 --num_images 10",
    "fid": "pipe --num_images 2 --num_inference_steps 2 --batch_size 2 --reference flat2 --encoder encoder --output_dir out",
    "app": "pipe",
    "latents verify": "--latents_dir cache",
    "latents export": "--latents_dir cache --output_dir out",
    "latents import": "--dataset export --output_dir out",
}

# Values that no option of a kind accepts.
WRONG_WHOLE = ("a", "2.5", "", "-1", "nan", "1e3", "0x10", "-99999999999999999999")
WRONG_NUMBER = ("a", "nan", "-1", "inf", "", "-inf", "1,5", "-1e400")
WHOLE = {
    "train": "seed logging_steps dataloader_num_workers max_train_samples resolution lora_rank encoder_layer projector_dim "
    "alignment_stop_step group_size policy_epochs train_batch_size gradient_accumulation_steps max_train_steps lr_warmup_steps "
    "profile checkpointing_steps checkpoints_total_limit validation_steps num_validation_images num_inference_steps "
    "num_fd_samples generative_policy_start_step rollout_classes rollout_group_size rollout_steps rollout_every rollout_epochs "
    "mc_samples reward_shallow_layer reward_queue_size reward_reference_images guard_every guard_samples scaffold_layer "
    "image_reward_every image_reward_start_step image_reward_resolution image_reward_batch_size",
    "prepare": "max_train_samples resolution seed patch_size dataloader_num_workers chunk_rows",
    "sample": "num_images seed num_inference_steps batch_size guidance_channels",
    "evaluate": "resolution max_features kid_subsets kid_subset_size inception_score_splits precision_recall_k "
    "density_coverage_k seed batch_size dataloader_num_workers",
    "probe": "num_train num_test cknna_k seed batch_size dataloader_num_workers",
    "layers": "num_train num_test encoder_layer seed batch_size dataloader_num_workers",
    "plan": "num_images num_processes train_batch_size resolution",
    "fid": "num_images seed num_inference_steps batch_size",
    "convert": "num_attention_heads num_classes alignment_layer",
}
NUMBERS = {
    "train": "label_dropout alignment_coeff spatial_norm policy_noise clip_range kl_coeff learning_rate adam_beta1 adam_beta2 "
    "adam_weight_decay adam_epsilon max_grad_norm ema_decay peak_tflops guidance_scale generative_coeff max_gradient_ratio "
    "rollout_clip_range anchor_coeff generative_learning_rate guard_loss_rise guard_recall_fall guard_distance_rise "
    "scaffold_fraction scaffold_coeff image_reward_share image_reward_max_t image_reward_fraction",
    "sample": "guidance_scale",
    "probe": "timesteps l2",
    "layers": "timesteps l2",
    "report": "target",
}

# Options, what the last line names, changed files.
TRAIN = [
    ("--objective reinforce", "--objective"),
    ("--estimator exact", "--estimator"),
    ("--lr_scheduler fast", "--lr_scheduler"),
    ("--mixed_precision fp8", "--mixed_precision"),
    ("--projector linear", "--projector"),
    ("--conflict ignore", "--conflict"),
    ("--release sometimes", "--release"),
    ("--token_weighting most", "--token_weighting"),
    ("--target_norm whiten", "--target_norm"),
    ("--target_norm whiten:1", "--target_norm"),
    ("--target_norm whiten:65", "--target_norm"),
    ("--scaffold_layer 9", "--scaffold_layer"),
    ("--scaffold_layer 1 --objective none ~--encoder", "--scaffold_layer"),
    ("--scaffold_fraction 0.1", "--scaffold_fraction|--scaffold_layer"),
    ("--objective repi --projector conv", "--projector"),
    ("--objective repi --scaffold_layer 1 --kl_coeff 1", "--kl_coeff"),
    ("--image_rewards beauty", "--image_rewards"),
    ("--image_rewards os:nothing", "--image_rewards"),
    ("--image_rewards perceptual perceptual", "--image_rewards"),
    ("--image_reward_share 0.5", "--image_reward_share"),
    ("--image_rewards perceptual --image_reward_share 1 2 3", "--image_reward_share"),
    ("--image_rewards perceptual --perceptual_layer 99", "--perceptual_layer"),
    ("--image_rewards perceptual --image_semantic_layer 1", "--image_semantic_layer"),
    ("--image_rewards perceptual --reward_vae vae", "--reward_vae"),
    ("--image_rewards perceptual --image_reward_start_step 5", "--image_reward_start_step"),
    ("--image_rewards perceptual --objective none ~--encoder", "--image_reward_encoder"),
    ("--preset SiT-XXL/2 ~--model_config", "--preset"),
    ("--preset SiT-B/3 ~--model_config", "--preset"),
    ("--preset SiT-S/2", "--preset"),
    ("--attention_backend warp", "--attention_backend"),
    ("--report_to nowhere", "--report_to"),
    ("--report_to ''", "--report_to"),
    ("--layer_scope 9", "--layer_scope"),
    ("--layer_scope 0", "--layer_scope"),
    ("--layer_scope 1,,2", "--layer_scope"),
    ("--layer_scope first", "--layer_scope"),
    ("--reward_weighting 1,2", "--reward_weighting"),
    ("--reward_weighting 0,0,0", "--reward_weighting"),
    ("--reward_weighting nan,1,1", "--reward_weighting"),
    ("--reward_weighting -1,1,1", "--reward_weighting"),
    ("--reward_weighting best", "--reward_weighting"),
    ("--encoder nowhere", "--encoder"),
    ("--encoder flat", "--encoder"),
    ("--encoder samples.npz", "--encoder"),
    ("--encoder digits nowhere", "--encoder"),
    ("--encoder ''", "--encoder"),
    ("--encoder pipe", "--encoder"),
    ("--encoder_layer 99", "--encoder_layer"),
    ("--encoder_layer -99", "--encoder_layer"),
    ("--encoder_layer 1 2", "--encoder_layer"),
    ("--vae nowhere", "--vae"),
    ("--vae ''", "--vae"),
    ("--vae pipe", "--vae"),
    ("--vae vae --resolution 7", "--resolution|--vae"),
    ("--vae vae", "vae|config.json", "vae/config.json = bad/garbage"),
    ("--vae vae", "vae|config.json", "vae/config.json = bad/json_list"),
    ("--vae vae", "vae|safetensors", "vae/diffusion_pytorch_model.safetensors = bad/pointer"),
    ("--vae vae", "vae|safetensors", "vae/diffusion_pytorch_model.safetensors = bad/safetensors_huge"),
    ("--vae vae", "vae|safetensors", "vae/diffusion_pytorch_model.safetensors -"),
    ("~--vae", "--vae"),
    ("~--encoder", "--encoder"),
    ("~--dataset_name", "--dataset_name"),
    ("--dataset_name nowhere", "--dataset_name"),
    ("--dataset_name ''", "--dataset_name"),
    ("--dataset_name owner/nowhere", "--dataset_name"),
    ("--dataset_name embedded:letters", "--dataset_name"),
    ("--dataset_name ../../etc", "--dataset_name"),
    ("--dataset_split holdout", "--dataset_split"),
    ("--dataset_config_name small", "--dataset_config_name|--dataset_name"),
    ("--image_column picture", "--image_column"),
    ("--label_column kind", "--label_column"),
    ("--label_column image --dataset_name table", "--label_column"),
    ("--image_column label --dataset_name table", "--image_column"),
    ("--dataset_name table_other_columns", "column"),
    ("--dataset_name table_negative", "label"),
    ("--dataset_name table_null", "label"),
    ("--dataset_name table_float", "label"),
    ("--dataset_name table_text_images", "image"),
    ("--dataset_name table_path", "table_path|path|image"),
    ("--dataset_name table_zero_device", "table_zero_device|path|image"),
    ("--dataset_name table_garbage", "table_garbage|image"),
    ("--dataset_name table_path --streaming", "table_path|path|image"),
    ("--dataset_name table_zero_device --streaming", "table_zero_device|path|image"),
    ("--dataset_name table_garbage --streaming", "table_garbage|image"),
    ("--dataset_name table_other_columns --streaming", "column"),
    ("--dataset_name table", "table|parquet", "table/train.parquet = bad/parquet_cut"),
    ("--dataset_name table", "table|parquet", "table/train.parquet = bad/empty"),
    ("--dataset_name table", "table|parquet", "table/train.parquet = bad/pointer"),
    ("--dataset_name table --streaming", "table|parquet", "table/train.parquet = bad/parquet_cut"),
    ("--dataset_name table --streaming", "table|parquet", "table/train.parquet = bad/garbage"),
    ("--dataset_name table --streaming", "table|parquet", "table/train.parquet |"),
    ("--streaming", "--streaming"),
    ("--train_data_dir images", "--dataset_name|--train_data_dir"),
    ("~--dataset_name --train_data_dir nowhere", "--train_data_dir"),
    ("~--dataset_name --train_data_dir model.json", "--train_data_dir"),
    ("~--dataset_name --train_data_dir ''", "--train_data_dir"),
    ("~--dataset_name --train_data_dir nothing", "--train_data_dir", "nothing/.keep : x"),
    ("~--dataset_name --train_data_dir table", "--train_data_dir"),
    ("~--dataset_name --train_data_dir pipe", "--train_data_dir"),
    ("~--dataset_name --train_data_dir cache", "--train_data_dir"),
    ("~--dataset_name --train_data_dir run", "--train_data_dir"),
    ("~--dataset_name --train_data_dir data[12]", r"--train_data_dir", "data1 = images"),
    ("~--dataset_name --train_data_dir *", r"--train_data_dir"),
    ("~--dataset_name --train_data_dir garbage", "--train_data_dir|garbage", "garbage/a/0.png = bad/garbage"),
    (
        "~--dataset_name --train_data_dir some",
        "--train_data_dir.*damaged",
        "some = images",
        "some/cat/0.png = bad/garbage",
    ),
    ("~--dataset_name --train_data_dir zipped", "--train_data_dir|zip", "zipped/train.zip = bad/zip_garbage"),
    ("~--dataset_name --train_data_dir tars", "--train_data_dir|tar", "tars/cat.tar = bad/tar"),
    ("~--dataset_name --train_data_dir fifos", "--train_data_dir|fifo", "fifos/a/0.png |"),
    ("~--dataset_name --train_data_dir linked", "--train_data_dir|linked", "linked/a/0.png -> {private}"),
    ("~--dataset_name --train_data_dir zero", "--train_data_dir|zero", "zero/a/0.png -> /dev/zero"),
    ("~--dataset_name --train_data_dir images --streaming", "--streaming"),
    ("~--dataset_name --latents_dir nowhere ~--vae", "--latents_dir"),
    ("~--dataset_name --latents_dir images ~--vae", "--latents_dir"),
    ("~--dataset_name --latents_dir model.json ~--vae", "--latents_dir"),
    ("~--dataset_name --latents_dir cache ~--vae --resolution 16", "--resolution"),
    ("~--dataset_name --latents_dir cache --vae stabilityai/sd-vae", "--vae"),
    ("~--dataset_name --latents_dir cache ~--vae --random_flip", "--random_flip|--latents_dir"),
    ("~--dataset_name --latents_dir cache ~--vae --no-center_crop", "--no-center_crop|--center_crop"),
    ("~--dataset_name --latents_dir cache ~--vae --max_train_samples 2", "--max_train_samples"),
    ("~--dataset_name --latents_dir cache ~--vae", "meta.json|--latents_dir", "cache/meta.json = bad/garbage"),
    ("~--dataset_name --latents_dir cache ~--vae", "meta.json|--latents_dir", "cache/meta.json = bad/json_list"),
    ("~--dataset_name --latents_dir cache ~--vae", "meta.json|--latents_dir", "cache/meta.json = bad/json_deep"),
    ("~--dataset_name --latents_dir cache ~--vae", "meta.json|--latents_dir", "cache/meta.json : {}"),
    ("~--dataset_name --latents_dir cache ~--vae", "labels.npy|--latents_dir", "cache/labels.npy = bad/garbage"),
    ("~--dataset_name --latents_dir cache ~--vae", "labels.npy|--latents_dir", "cache/labels.npy -"),
    ("--max_train_steps 4 --num_train_epochs 1", "--num_train_epochs|--max_train_steps"),
    ("--generative_policy_start_step 5", "--generative_policy_start_step"),
    ("--group_size 4", "--group_size"),
    ("--policy_noise 0.3", "--policy_noise"),
    ("--clip_range 0.3 --estimator sampled", "--clip_range"),
    ("--rollout_steps 3", "--rollout_steps"),
    ("--hub_model_id me/x", "--hub_model_id"),
    ("--objective repa --estimator sampled", "--estimator"),
    ("--objective none --layer_scope mid", "--layer_scope"),
    ("--release stop", "--release"),
    ("--release none --alignment_stop_step 5", "--release"),
    ("--release plateau --conflict gate", "--conflict"),
    ("--objective rare --conflict gate", "--conflict"),
    ("--lr_scheduler constant --lr_warmup_steps 3", "--lr_scheduler"),
    ("--num_fd_samples 5", "--num_fd_samples"),
    ("--fd_encoder nowhere", "--fd_encoder"),
    ("--fd_encoder inception", "--fd_encoder"),
    ("--validation_labels unicorn", "--validation_labels"),
    ("--validation_labels 99", "--validation_labels"),
    ("--validation_labels -1", "--validation_labels"),
    ("--prediction_type noise", "--prediction_type"),
    ("--learn_sigma --prediction_type velocity", "--learn_sigma"),
    ("--num_inference_steps 2000 --prediction_type epsilon", "--num_inference_steps"),
    ("--lora_rank 4", "--lora_rank"),
    ("--lora_rank 100000 --pretrained_model_name_or_path pipe ~--model_config", "--lora_rank"),
    ("--train_batch_size 1000000000", "--train_batch_size"),
    ("--dataloader_num_workers 100000", "--dataloader_num_workers"),
    (
        "--generative_policy_start_step 0 --max_train_steps 4 --rollout_classes 1000000",
        "--rollout_classes|--reward_queue_size",
    ),
    ("--generative_policy_start_step 0 --max_train_steps 4 --reward_function nowhere.py:f", "--reward_function"),
    ("--generative_policy_start_step 0 --max_train_steps 4 --reward_function model.json", "--reward_function"),
    ("--generative_policy_start_step 0 --max_train_steps 4 --reward_weights 1", "--reward_weights"),
    ("--generative_policy_start_step 0 --max_train_steps 4 --reward_encoder inception", "--reward_encoder"),
    ("--guidance_scale nan", "--guidance_scale"),
    ("--guidance_scale inf", "--guidance_scale"),
    ("--guidance_scale -1", "--guidance_scale"),
    ("--seed 9223372036854775808", "--seed"),
    ("--resolution 1000000", "--resolution"),
    ("--resolution 7", "--resolution"),
    ("--max_grad_norm 0", "--max_grad_norm"),
    ("--adam_beta1 1", "--adam_beta1"),
    ("--model_config nowhere.json", "--model_config"),
    ("--model_config pipe", "--model_config"),
    ("--model_config ''", "--model_config"),
    *[
        ("--model_config x.json", "--model_config|x.json", f"x.json = bad/{name}")
        for name in [
            "empty",
            "garbage",
            "json_list",
            "json_number",
            "json_cut",
            "json_deep",
            "json_nan",
            "json_huge",
            "pickle",
        ]
    ],
    ("--model_config x.json", "--model_config|x.json", 'x.json : {"num_layers": "two"}'),
    ("--model_config x.json", "--model_config|x.json", 'x.json : {"num_layers": 1000000}'),
    ("--model_config x.json", "--model_config|x.json", 'x.json : {"num_layers": -1}'),
    ("--model_config x.json", "--model_config|x.json", 'x.json : {"patch_size": 0}'),
    ("--model_config x.json", "--model_config|x.json", 'x.json : {"attention_head_dim": 1.5}'),
    ("--model_config x.json", "--model_config|x.json", 'x.json : {"colour": "red"}'),
    ("--model_config x.json", "--model_config|x.json", "x.json |"),
    ("--config nowhere.yaml", "--config"),
    ("--config pipe", "--config"),
    *[
        ("--config x.yaml", "--config", f"x.yaml = bad/{name}")
        for name in [
            "garbage",
            "text",
            "page",
            "json_number",
            "json_deep",
            "yaml_list",
            "yaml_python",
            "yaml_bomb",
            "yaml_tab",
            "yaml_latin",
        ]
    ],
    ("--config x.yaml", "--config|resolutoin", "x.yaml : resolutoin: 8\\n"),
    ("--config x.yaml", "seed", "x.yaml : seed: many\\n"),
    ("--config x.yaml", "seed", "x.yaml : seed: [1, 2]\\n"),
    ("--config x.yaml", "encoder", "x.yaml : encoder: {a: 1}\\n"),
    ("--config x.yaml", "use_ema", "x.yaml : use_ema: maybe\\n"),
    ("--config x.yaml", "resolution", "x.yaml : resolution: true\\n"),
    ("--config x.yaml", "config", "x.yaml : config: x.yaml\\n"),
    ("--config x.yaml", "guidance_scale", "x.yaml : guidance_scale: .nan\\n"),
    ("--resolutoin 8", "--resolutoin"),
    ("word", "word|arguments"),
    ("--pretrained_model_name_or_path nowhere ~--model_config", "--pretrained_model_name_or_path"),
    ("--pretrained_model_name_or_path pipe", "--model_config"),
    ("--pretrained_model_name_or_path latent_pipe ~--model_config", "--pretrained_model_name_or_path|latent_pipe"),
    ("--pretrained_model_name_or_path images ~--model_config", "--pretrained_model_name_or_path"),
    ("--pretrained_model_name_or_path vae ~--model_config", "--pretrained_model_name_or_path"),
    *[
        (
            "--pretrained_model_name_or_path x.pt ~--model_config",
            "--pretrained_model_name_or_path|x.pt",
            f"x.pt = bad/{name}",
        )
        for name in [
            "empty",
            "garbage",
            "zeros",
            "text",
            "page",
            "pointer",
            "json_list",
            "pickle",
            "zip_garbage",
            "safetensors_huge",
        ]
    ],
    ("--pretrained_model_name_or_path nan.pt ~--model_config", "nan.pt|NaN|finite"),
    ("--pretrained_model_name_or_path integers.pt ~--model_config", "integers.pt"),
    ("--pretrained_model_name_or_path lacking.pt ~--model_config", "lacking.pt"),
    ("--resume_from_checkpoint nowhere", "--resume_from_checkpoint"),
    ("--resume_from_checkpoint images", "--resume_from_checkpoint"),
    ("--resume_from_checkpoint hub", "--resume_from_checkpoint"),
    ("--output_dir model.json", "--output_dir|model.json"),
    ("--output_dir ''", "--output_dir"),
    ("--output_dir /proc/x", "--output_dir"),
    ("--output_dir /dev/null", "--output_dir"),
    ("--output_dir model.json/x", "--output_dir"),
    ("--output_dir images", "--output_dir"),
    ("--output_dir pipe", "--output_dir"),
    ("--output_dir pipe --pretrained_model_name_or_path pipe ~--model_config --lora_rank 2", "--output_dir"),
    ("--output_dir run", "--output_dir|run", "run/checkpoint-2 -"),
    ("--output_dir run --max_train_steps 1", "--max_train_steps"),
    ("--output_dir run --max_train_steps 4 --seed 5", "seed"),
    ("--output_dir run --max_train_steps 4 --learning_rate 0.5", "learning_rate"),
    ("--output_dir run --max_train_steps 4 --objective repa", "objective"),
    ("--output_dir run --max_train_steps 4 --dataset_name table", "num_classes|data"),
    ("--output_dir run --max_train_steps 4", "run|lock", "run/.lock -> {private}"),
    ("--output_dir run --max_train_steps 4", "run|lock", "run/.lock |"),
    ("--output_dir run --max_train_steps 4", "train_config", "run/train_config.yaml -> {private}"),
    ("--output_dir run --max_train_steps 4", "metrics", "run/metrics.jsonl -> {private}"),
    ("--output_dir run --max_train_steps 4", "metrics", "run/metrics.jsonl |"),
    ("--output_dir run --max_train_steps 4", "checkpoint-2|manifest", "run/checkpoint-2/manifest.json : {}"),
    ("--output_dir run --max_train_steps 4", "checkpoint-2|manifest", "run/checkpoint-2/manifest.json = bad/garbage"),
    (
        "--output_dir run --max_train_steps 4",
        "checkpoint-2|manifest",
        "run/checkpoint-2/manifest.json = bad/json_deep",
    ),
    ("--output_dir run --max_train_steps 4", "checkpoint-2", "run/checkpoint-2/training_state.json = bad/json_list"),
    ("--output_dir run --max_train_steps 4", "checkpoint-2", "run/checkpoint-2/optimizer.bin = bad/pickle"),
    ("--output_dir run --max_train_steps 4", "checkpoint-2", "run/checkpoint-2/optimizer.bin |"),
    (
        "--output_dir run --max_train_steps 4",
        "checkpoint-2",
        "run/checkpoint-2/transformer/config.json = bad/json_list",
    ),
]

PREPARE = [
    ("--images gif", "--images"),
    ("--vae_dtype int8", "--vae_dtype"),
    ("--vae nowhere", "--vae"),
    ("~--vae", "--vae"),
    ("~--output_dir", "--output_dir"),
    ("--output_dir model.json", "--output_dir|model.json"),
    ("--output_dir /proc/x", "--output_dir"),
    ("--output_dir ''", "--output_dir"),
    ("--output_dir pipe", "--output_dir|pipe"),
    ("--output_dir images", "--output_dir|images"),
    ("--output_dir cache --resolution 4", "resolution|--output_dir"),
    ("--train_data_dir nowhere", "--train_data_dir"),
    ("--train_data_dir table", "--train_data_dir"),
    ("--train_data_dir ''", "--train_data_dir"),
    ("~--train_data_dir", "--train_data_dir|--dataset_name"),
    ("~--train_data_dir --dataset_name table_path", "table_path|path|image"),
    ("~--train_data_dir --dataset_name table_zero_device", "table_zero_device|path|image"),
    ("~--train_data_dir --dataset_name table_garbage", "table_garbage|image"),
    ("--dataset_name digits", "--dataset_name|--train_data_dir"),
    ("--encoder nowhere", "--encoder"),
    ("--encoder_layer 1 2 --encoder digits", "--encoder_layer"),
    ("--encoder digits --patch_size 3", "--patch_size|--resolution"),
    ("--resolution 0", "--resolution"),
    ("--sampled --vae none --encoder digits", "--sampled|--vae"),
    ("--vae none", "--vae"),
    ("--dataloader_num_workers 100000", "--dataloader_num_workers"),
]

SAMPLE = [
    ("nowhere", "nowhere|PIPELINE"),
    ("images", "images|PIPELINE"),
    ("model.json", "model.json|PIPELINE"),
    ("''", "PIPELINE"),
    ("latent_pipe", "latent_pipe|PIPELINE|autoencoder"),
    ("vae", "vae|PIPELINE"),
    ("~--num_images", "--num_images"),
    ("--num_images 10000000000000", "--num_images"),
    ("--labels unicorn", "--labels"),
    ("--labels 10", "--labels"),
    ("--labels -1", "--labels"),
    ("--labels 1.5", "--labels"),
    ("--labels", "--labels"),
    ("--sampler euler", "--sampler"),
    ("--sampler ddim", "--sampler"),
    ("noise_pipe --sampler heun", "--sampler"),
    ("noise_pipe --sampler ddim --num_inference_steps 7", "--num_inference_steps"),
    ("noise_pipe --num_inference_steps 5000", "--num_inference_steps"),
    ("--sampler sde --num_inference_steps 1", "--num_inference_steps"),
    ("unguided_pipe --guidance_scale 2", "--guidance_scale"),
    ("--guidance_scale inf", "--guidance_scale"),
    ("--guidance_interval 0.8 0.2", "--guidance_interval"),
    ("--guidance_interval nan 1", "--guidance_interval"),
    ("--guidance_interval 0 2", "--guidance_interval"),
    ("--guidance_interval 0", "--guidance_interval"),
    ("--guidance_channels 9", "--guidance_channels"),
    ("--guidance_channels some", "--guidance_channels"),
    ("--dtype int8", "--dtype"),
    ("--output_format gif", "--output_format"),
    ("--output_dir model.json", "--output_dir|model.json"),
    ("--output_dir images", "--output_dir"),
    ("--output_dir /proc/x", "--output_dir"),
    ("--output_dir ''", "--output_dir"),
    ("--variant fp16", "variant|fp16"),
    *[
        ("", "pipe|model_index", f"pipe/model_index.json = bad/{name}")
        for name in ["empty", "garbage", "json_list", "json_number", "json_cut", "json_deep", "page"]
    ],
    *[
        ("", "pipe|config.json", f"pipe/transformer/config.json = bad/{name}")
        for name in ["empty", "garbage", "json_list", "json_cut", "json_nan", "json_huge"]
    ],
    *[
        ("", "pipe|safetensors", f"pipe/transformer/diffusion_pytorch_model.safetensors = bad/{name}")
        for name in ["empty", "garbage", "pointer", "page", "safetensors_huge", "safetensors_lies", "safetensors_list"]
    ],
    ("", "pipe|safetensors", "pipe/transformer/diffusion_pytorch_model.safetensors -"),
    ("", "pipe|safetensors", "pipe/transformer/diffusion_pytorch_model.safetensors |"),
    (
        "",
        "pipe|safetensors",
        "pipe/transformer/diffusion_pytorch_model.safetensors = vae/diffusion_pytorch_model.safetensors",
    ),
    ("", "pipe|scheduler", "pipe/scheduler/scheduler_config.json = bad/json_list"),
    ("", "pipe|scheduler", "pipe/scheduler -"),
]

EVALUATE = [
    ("nowhere", "nowhere|SAMPLES"),
    ("model.json", "model.json|SAMPLES"),
    ("pipe", "pipe|SAMPLES|images"),
    ("''", "SAMPLES"),
    ("mixed", "mixed|size"),
    ("object.npz", "object.npz"),
    ("floats.npz", "floats.npz"),
    ("other_key.npz", "other_key.npz"),
    *[
        ("x.npz", "x.npz", f"x.npz = bad/{name}")
        for name in ["empty", "garbage", "zip_garbage", "text", "pickle", "npz_huge", "npz_zeros"]
    ],
    ("x.npz", "x.npz", "x.npz |"),
    ("flat", "flat|0.png", "flat/0.png = bad/garbage"),
    ("~--reference", "--reference"),
    ("--reference nowhere", "--reference"),
    ("--reference mixed", "--reference|mixed"),
    ("--reference model.json", "--reference|model.json"),
    ("--reference images", "--reference|size|--resolution"),
    ("--reference x.safetensors", "--reference|x.safetensors", "x.safetensors = bad/garbage"),
    ("--reference x.safetensors", "--reference|x.safetensors", "x.safetensors = bad/safetensors_huge"),
    ("--reference pipe/transformer/diffusion_pytorch_model.safetensors", "--reference|safetensors"),
    ("--reference_split test", "--reference_split"),
    ("--image_column picture", "--image_column"),
    ("--metrics fad", "--metrics"),
    ("--metrics is", "--metrics|Inception"),
    ("--metrics", "--metrics"),
    ("--encoder nowhere", "--encoder"),
    ("--encoder images", "--encoder"),
    ("--encoder inception --inception_weights nowhere.pth", "--inception_weights"),
    ("--encoder inception --inception_weights x.pth", "--inception_weights|x.pth", "x.pth = bad/pickle"),
    ("--encoder inception --inception_weights x.pth", "--inception_weights|x.pth", "x.pth = bad/pointer"),
    ("--encoder encoder", "encoder", "encoder/config.json = bad/json_list"),
    ("--encoder encoder", "encoder", "encoder/model.safetensors = bad/pointer"),
    ("--pooling max", "--pooling"),
    ("--precision_recall_k 1000", "--precision_recall_k"),
    ("--metrics kid --kid_subset_size 1000", "--kid_subset_size|kid"),
    ("--output_file flat", "--output_file"),
    ("--output_file /proc/x.json", "--output_file"),
    ("--output_file model.json/x.json", "--output_file"),
    ("--plot_file x.exe", "--plot_file"),
    ("--plot_file flat", "--plot_file"),
    ("--plot_file /proc/x.png", "--plot_file"),
    ("--save_reference /proc/x.safetensors", "--save_reference"),
    ("--reference_cache model.json", "--reference_cache"),
    ("--dataloader_num_workers 100000", "--dataloader_num_workers"),
]

LAYERS = [
    ("nowhere", "nowhere|MODEL"),
    ("images", "images|MODEL"),
    ("latent_pipe", "latent_pipe|MODEL|autoencoder|vae"),
    ("--dataset_name nowhere", "--dataset_name"),
    ("--dataset_name table_garbage --num_train 4 --num_test 2", "table_garbage|image"),
    ("--dataset_split holdout", "--dataset_split"),
    ("--image_column picture", "--image_column"),
    ("--timesteps", "--timesteps"),
    ("--timesteps 1.5", "--timesteps"),
    ("--encoder nowhere", "--encoder"),
    ("~--encoder", "--encoder"),
    ("--encoder_layer 99", "--encoder_layer|layer"),
    ("--num_train 1", "--num_train"),
    ("--num_train 1000000", "--num_train"),
    ("--vae vae", "--vae|vae"),
    ("--output_file /proc/x.json", "--output_file"),
    ("~--dataset_name", "--dataset_name"),
]

PROBE = [
    ("nowhere", "nowhere|PIPELINE"),
    ("images", "images|PIPELINE"),
    ("latent_pipe", "latent_pipe|PIPELINE|autoencoder|vae"),
    ("--dataset_name nowhere", "--dataset_name"),
    ("--dataset_name table_garbage --num_train 4 --num_test 2", "table_garbage|image"),
    ("--dataset_name table_path --num_train 4 --num_test 2", "table_path|path|image"),
    ("--dataset_split holdout", "--dataset_split"),
    ("--test_split holdout", "--test_split"),
    ("--label_column kind", "--label_column"),
    ("--image_column picture", "--image_column"),
    ("--timesteps", "--timesteps"),
    ("--timesteps 1.5", "--timesteps"),
    ("--encoder nowhere", "--encoder"),
    ("--cknna_k 1", "--cknna_k"),
    ("--cknna_k 100 --encoder encoder", "--cknna_k"),
    ("--num_train 1", "--num_train"),
    ("--pooling max", "--pooling"),
    ("--output_file /proc/x.json", "--output_file"),
    ("--plot_file x.exe", "--plot_file"),
    ("~--dataset_name", "--dataset_name"),
]

CONVERT = [
    ("nowhere.pt out", "nowhere.pt"),
    ("images out", "images"),
    ("vae out", "vae"),
    ("'' out", "CHECKPOINT|''"),
    *[
        ("x.pt out", "x.pt", f"x.pt = bad/{name}")
        for name in [
            "empty",
            "garbage",
            "zeros",
            "text",
            "page",
            "pointer",
            "json_list",
            "json_cut",
            "pickle",
            "zip_garbage",
        ]
    ],
    *[
        ("x.safetensors out", "x.safetensors", f"x.safetensors = bad/{name}")
        for name in ["empty", "garbage", "pointer", "page", "safetensors_huge", "safetensors_lies", "safetensors_list"]
    ],
    ("x.pt out", "x.pt", "x.pt |"),
    ("tensor.pt out", "tensor.pt"),
    ("numbers.pt out", "numbers.pt"),
    ("nan.pt out", "nan.pt"),
    ("integers.pt out", "integers.pt"),
    ("lacking.pt out", "lacking.pt"),
    ("foreign.pt out", "foreign"),
    ("official.pt pipe", "pipe|OUTPUT_DIR"),
    ("official.pt run", "run|OUTPUT_DIR"),
    ("official.pt images", "images|OUTPUT_DIR"),
    ("official.pt model.json", "model.json|OUTPUT_DIR"),
    ("official.pt /proc/x", "/proc/x|OUTPUT_DIR"),
    ("official.pt ''", "OUTPUT_DIR|''"),
    ("--format pixart", "--format"),
    ("--format dit --preset SiT-S/2", "--format|--preset"),
    ("--preset SiT-XL/2", "--preset|official.pt"),
    ("--preset SiT-Z", "--preset"),
    ("--num_attention_heads 3", "--num_attention_heads"),
    ("--num_attention_heads 0", "--num_attention_heads"),
    ("--vae nowhere", "--vae"),
    ("--vae images", "--vae"),
    ("--to vit", "--to"),
    ("pipe x.pt --to dit ~--vae ~--num_attention_heads", "--to|x.pt|dit"),
    ("--ema_key", "--ema_key"),
    *[
        ("--id2label x.json", "--id2label|x.json", f"x.json = bad/{name}")
        for name in ["empty", "garbage", "json_list", "json_deep"]
    ],
    ("--id2label x.json", "--id2label|x.json", 'x.json : {"zero": "a"}'),
    ("--id2label x.json", "--id2label|x.json", 'x.json : {"0": 5}'),
    ("--id2label x.json", "--id2label|x.json", 'x.json : {"99": "a"}'),
    ("--id2label nowhere.json", "--id2label"),
    ("pipe x.exe --to sit ~--vae ~--num_attention_heads", "x.exe|OUTPUT_DIR"),
    ("pipe /proc/x.pt --to sit ~--vae ~--num_attention_heads", "/proc/x.pt|OUTPUT_DIR"),
    (
        "pipe out/x.pt --to sit ~--vae ~--num_attention_heads",
        "pipe|safetensors",
        "pipe/transformer/diffusion_pytorch_model.safetensors -",
    ),
]

PUSH = [
    ("", "--hub_model_id|offline|OFFLINE|token"),
    ("nowhere", "nowhere"),
    ("images", "images"),
    ("model.json", "model.json"),
    ("''", "OUTPUT_DIR"),
    ("--hub_model_id a/b/c", "--hub_model_id"),
    ("--hub_model_id ''", "--hub_model_id"),
    ("--hub_model_id 'me/x y'", "--hub_model_id"),
    ("run", "run|samples.png", "run/samples.png -> {private}"),
    ("run", "run|model_index", "run/model_index.json = bad/garbage"),
    ("run", "run|model_index", "run/model_index.json = bad/json_list"),
]

REPORT = [
    ("nowhere", "nowhere"),
    ("images", "images"),
    ("run run", "run"),
    ("--metric quality", "--metric"),
    ("--metric ''", "--metric"),
    ("--baseline nobody", "--baseline"),
    ("--arms a", "--arms"),
    ("--arms =run", "--arms"),
    ("--arms a=nowhere", "nowhere"),
    ("--output_dir model.json", "--output_dir|model.json"),
    ("--output_dir /proc/x", "--output_dir"),
    ("", "train_config", "run/train_config.yaml = bad/yaml_list"),
    ("", "train_config|run", "run/train_config.yaml = bad/yaml_python"),
    ("", "train_config|run", "run/train_config.yaml = bad/garbage"),
    ("", "train_config|run", "run/train_config.yaml |"),
    ("", "metrics|run", "run/metrics.jsonl = bad/garbage"),
    ("", "metrics|run", "run/metrics.jsonl = bad/empty"),
    ("", "metrics|run", "run/metrics.jsonl = bad/json_deep"),
    ("", "metrics|run", "run/metrics.jsonl |"),
]

LATENTS_VERIFY = [
    ("--latents_dir nowhere", "--latents_dir"),
    ("--latents_dir images", "--latents_dir"),
    ("~--latents_dir", "--latents_dir"),
    *[
        ("", "cache|meta.json", f"cache/meta.json = bad/{name}")
        for name in ["empty", "garbage", "json_list", "json_number", "json_deep", "json_cut"]
    ],
    ("", "cache|meta.json", "cache/meta.json |"),
    ("", "cache", "cache/labels.npy = bad/garbage"),
    ("", "cache", "cache/labels.npy -> {private}"),
]

LATENTS_EXPORT = [
    ("--latents_dir nowhere", "--latents_dir"),
    ("--output_dir images", "--output_dir"),
    ("--output_dir model.json", "--output_dir"),
    ("--output_dir /proc/x", "--output_dir"),
    ("--push_to_hub me/x", "--push_to_hub"),
]

LATENTS_IMPORT = [
    ("--dataset nowhere", "--dataset"),
    ("--dataset images", "--dataset"),
    ("--output_dir images", "--output_dir"),
    ("--output_dir /proc/x", "--output_dir"),
    ("", "export|meta.json", "export/meta.json = bad/garbage"),
    ("", "export|meta.json", "export/meta.json : {}"),
    ("", "export", "export/data -"),
    ("", "export|parquet", "export/data/train-00000-of-00001.parquet = bad/parquet_cut"),
]

# Expressions, what the message names, changed files.
PYTHON = [
    ("VRPOConfig(resolution='a')", "resolution"),
    ("VRPOConfig(resolution=True)", "resolution"),
    ("VRPOConfig(resolution=2.5)", "resolution"),
    ("VRPOConfig(learning_rate=nan)", "learning_rate"),
    ("VRPOConfig(learning_rate=inf)", "learning_rate"),
    ("VRPOConfig(guidance_scale=nan)", "guidance_scale"),
    ("VRPOConfig(guidance_scale=-2.0)", "guidance_scale"),
    ("VRPOConfig(encoder='digits')", "encoder"),
    ("VRPOConfig(encoder=[1])", "encoder"),
    ("VRPOConfig(output_dir=None)", "output_dir"),
    ("VRPOConfig(output_dir=3)", "output_dir"),
    ("VRPOConfig(objective='rl')", "objective"),
    ("VRPOConfig(use_ema='yes')", "use_ema"),
    ("VRPOConfig(max_train_steps=0)", "max_train_steps"),
    ("VRPOTrainer()", "train_dataset|encoders"),
    ("VRPOTrainer(model=3, args=VRPOConfig(output_dir='out'))", "model"),
    ("train(encoder=['nowhere'])", "encoder"),
    ("train(train_data_dir='nowhere', dataset_name=None)", "train_data_dir"),
    ("train(lora_rank=100000, pretrained_model_name_or_path='pipe', model_config=None)", "lora_rank"),
    (
        "VRPOTrainer(encoders='digits', vae='none', train_dataset=[1, 2], args=VRPOConfig(output_dir='out'))",
        "train_dataset",
    ),
    ("VRPOTrainer(encoders=[3], vae='none', args=VRPOConfig(output_dir='out', dataset_name='digits'))", "encoder"),
    ("VRPOPipeline.from_pretrained('nowhere')", "nowhere"),
    ("VRPOPipeline.from_pretrained('images')", "images|model_index"),
    (
        "VRPOPipeline.from_pretrained('pipe')",
        "transformer|safetensors",
        "pipe/transformer/diffusion_pytorch_model.safetensors -",
    ),
    ("VRPOPipeline.from_pretrained('pipe')", "model_index|id2label", "pipe/model_index.json = bad/json_list"),
    (
        "VRPOPipeline.from_pretrained('pipe')(0)",
        "transformer|finite|weight",
        "pipe/transformer/config.json = bad/json_list",
    ),
    ("opened()([])", "class_labels"),
    ("opened()('unicorn')", "class_labels"),
    ("opened()(99)", "class_labels"),
    ("opened()(1.5)", "class_labels"),
    ("opened()(None)", "class_labels"),
    ("opened()(0, num_inference_steps=2.5)", "num_inference_steps"),
    ("opened()(0, num_inference_steps=0)", "num_inference_steps"),
    ("opened()(0, num_inference_steps='a')", "num_inference_steps"),
    ("opened()(0, num_inference_steps=True)", "num_inference_steps"),
    ("opened()(0, num_images_per_label=0)", "num_images_per_label"),
    ("opened()(0, num_images_per_label=1.5)", "num_images_per_label"),
    ("opened()(0, num_images_per_label='2')", "num_images_per_label"),
    ("opened()(0, guidance_scale='a')", "guidance_scale"),
    ("opened()(0, guidance_scale=nan)", "guidance_scale"),
    ("opened()(0, guidance_scale=inf)", "guidance_scale"),
    ("opened()(0, guidance_scale=-1.0)", "guidance_scale"),
    ("opened()(0, guidance_interval=(1, 0))", "guidance_interval"),
    ("opened()(0, guidance_interval=0.5)", "guidance_interval"),
    ("opened()(0, guidance_interval=('a', 'b'))", "guidance_interval"),
    ("opened()(0, guidance_channels=0)", "guidance_channels"),
    ("opened()(0, generator=5)", "generator"),
    ("opened()(0, generator=[torch.Generator()] * 3)", "generator"),
    ("opened()(0, latents=torch.zeros(1, 4, 8, 8))", "latents"),
    ("opened()(0, latents='noise')", "latents"),
    ("opened()(0, latents=torch.full((1, 3, 8, 8), nan))", "latents"),
    ("opened()(0, output_type='jpg')", "output_type"),
    ("opened()(0, callback_on_step_end_tensor_inputs=['x'])", "callback_on_step_end_tensor_inputs"),
    ("opened()(0, callback_on_step_end=5)", "callback_on_step_end"),
    ("opened('latent_pipe')(0)", "output_type|autoencoder"),
    (
        "AlignedTransformer(SiTTransformer2DModel(sample_size=8, num_layers=2), [9], [load_encoder('digits', (4, 4))])",
        "layers",
    ),
    (
        "AlignedTransformer(SiTTransformer2DModel(sample_size=8, num_layers=2), [1], [load_encoder('digits', (4, 4))], 'x')",
        "projector",
    ),
    ("sit_preset('SiT-Z/2')", "SiT-Z"),
    ("load_encoder('nowhere', (4, 4))", "nowhere"),
    ("load_encoder('images', (4, 4))", "images"),
    ("load_encoder('digits', (4, 4), layer=99)", "layer"),
    ("load_encoder('digits', (4, 4), resize='x')", "resize"),
    ("load_encoder('encoder', (4, 4))", "encoder", "encoder/model.safetensors = bad/garbage"),
    ("load_encoder('encoder', (4, 4))", "encoder", "encoder/config.json = bad/garbage"),
    ("load_training_data(VRPOConfig(dataset_name='nowhere'))", "dataset_name"),
    ("load_training_data(VRPOConfig(train_data_dir='nowhere'))", "train_data_dir"),
    ("load_training_data(VRPOConfig(latents_dir='nowhere'))", "latents_dir"),
    ("load_training_data(VRPOConfig(dataset_name='table', image_column='x'))", "image_column"),
    ("metrics.mean_and_covariance(torch.full((4, 3), nan))", "finite"),
    ("metrics.mean_and_covariance(torch.zeros(1, 3))", "two|at least"),
    ("metrics.mean_and_covariance(torch.zeros(3))", "shape|feature"),
    ("metrics.frechet_distance(torch.zeros(3), torch.eye(3), torch.zeros(4), torch.eye(4))", "shape"),
    ("metrics.frechet_distance(torch.zeros(3), -torch.eye(3), torch.zeros(3), torch.eye(3))", "covariance"),
    ("metrics.kernel_distance(torch.zeros(1, 3), torch.zeros(5, 3))", "feature|image|at least"),
    ("metrics.precision_recall(torch.zeros(2, 3), torch.zeros(2, 3))", "feature|neighbour|more"),
    ("metrics.inception_score(torch.zeros(3, 10))", "3 images"),
    ("metrics.inception_score(torch.full((20, 10), inf))", "finite"),
    ("metrics.cka(torch.rand(5, 3), torch.rand(4, 3))", "5|4|same|number"),
    ("metrics.cknna(torch.rand(5, 3), torch.rand(5, 3), k=9)", "k"),
    ("compare.fid('nowhere', 'flat', encoder='encoder')", "nowhere"),
    ("compare.fid([], 'flat', encoder='encoder')", "samples|images"),
    ("compare.fid('flat', 'flat2', encoder='nowhere')", "encoder|nowhere"),
    ("compare.fid(np.zeros((4, 8, 8)), 'flat', encoder='encoder')", "samples|shape"),
    ("image_encoders.load_image_encoder('nowhere')", "nowhere"),
]

# These were tried once the cases above ended in sentences: the command, and then as above. At first 52 of these 68 did.
MORE = [
    ("train", "--cache_dir model.json --fd_encoder me/x", "cache_dir|fd_encoder"),
    ("train", "--fd_encoder vae", "fd_encoder"),
    ("train", "--fd_encoder encoder", "fd_encoder|encoder", "encoder/config.json = bad/json_deep"),
    ("train", "--encoder encoder", "encoder", "encoder/config.json = bad/json_deep"),
    ("train", "--encoder encoder", "encoder", "encoder/preprocessor_config.json = bad/json_list"),
    ("train", "--encoder encoder", "encoder", "encoder/model.safetensors = bad/safetensors_lies"),
    ("train", "--encoder encoder", "encoder", "encoder/model.safetensors |"),
    (
        "train",
        "--generative_policy_start_step 0 --max_train_steps 4 --reward_function model.json:f",
        "reward_function",
    ),
    (
        "train",
        "--generative_policy_start_step 0 --max_train_steps 4 --reward_reference model.json",
        "reward_reference",
    ),
    ("train", "--generative_policy_start_step 0 --max_train_steps 4 --reward_reference /proc/x", "reward_reference"),
    ("train", "--config x.yaml", "encoder", "x.yaml : encoder: [digits, {a: 1}]\\n"),
    ("train", "--config x.yaml", "config", "x.yaml |"),
    (
        "train",
        "--pretrained_model_name_or_path pipe ~--model_config",
        "pipe|model_index",
        "pipe/model_index.json = bad/json_deep",
    ),
    ("train", "--pretrained_model_name_or_path pipe ~--model_config", "pipe|config", "pipe/transformer/config.json |"),
    (
        "train",
        "--pretrained_model_name_or_path pipe ~--model_config",
        "pipe|safetensors",
        "pipe/transformer/diffusion_pytorch_model.safetensors |",
    ),
    ("train", "--vae vae", "vae", "vae/config.json |"),
    ("train", "--vae vae", "vae", "vae/config.json = bad/json_deep"),
    ("train", "--vae vae", "vae", "vae/diffusion_pytorch_model.safetensors |"),
    ("train", "--output_dir run --max_train_steps 4", "starts|run", "run/starts.jsonl |"),
    ("evaluate", "--reference x.npz", "x.npz", "x.npz = bad/npz_huge"),
    ("evaluate", "--reference x.npz", "x.npz", "x.npz = bad/pickle"),
    (
        "evaluate",
        "--encoder inception --inception_weights x.safetensors",
        "x.safetensors",
        "x.safetensors = bad/safetensors_huge",
    ),
    ("evaluate", "--encoder encoder", "encoder", "encoder/preprocessor_config.json = bad/json_list"),
    ("evaluate", "--encoder encoder", "encoder", "encoder/preprocessor_config.json = bad/json_deep"),
    ("evaluate", "--encoder encoder", "encoder", "encoder/model.safetensors |"),
    ("evaluate", "--output_file x.json", "x.json", "x.json = bad/json_deep"),
    ("sample", "", "scheduler", "pipe/scheduler/scheduler_config.json = bad/json_deep"),
    ("sample", "", "scheduler", "pipe/scheduler/scheduler_config.json |"),
    ("sample", "", "pipe", "pipe/model_index.json |"),
    ("sample", "", "pipe|config", "pipe/transformer/config.json |"),
    ("sample", "--labels ''", "labels"),
    ("sample", "--revision main", "revision"),
    ("sample", "--output_dir out", "manifest|out", "out/manifest.json = bad/json_deep"),
    ("sample", "--output_dir out", "manifest|out", "out/manifest.json |"),
    ("probe", "--encoder encoder", "encoder", "encoder/config.json = bad/json_deep"),
    ("convert", "x.pt out", "x.pt", "x.pt = bad/tar"),
    ("convert", "--id2label x.json", "id2label", "x.json |"),
    ("convert", "--vae vae", "vae", "vae/config.json = bad/json_deep"),
    ("push", "run", "run", "run/model_index.json |"),
    ("push", "run", "run", "run/model_index.json = bad/json_deep"),
    ("report", "", "starts|run", "run/starts.jsonl |"),
    ("latents verify", "", "cache", "cache/latents.npy |"),
    ("latents verify", "", "cache", "cache/labels.npy = bad/empty"),
    ("latents import", "", "export", "export/meta.json |"),
    ("latents import", "", "export|parquet", "export/data/train-00000-of-00001.parquet |"),
    ("latents import", "", "export|parquet", "export/data/train-00000-of-00001.parquet = table/train.parquet"),
    ("prepare", "--vae vae", "vae", "vae/config.json = bad/json_list"),
    ("prepare", "--resume x", "resume"),
    ("python", "opened()(0, height=7)", "height"),
    ("python", "opened()(0, height='a')", "height"),
    ("python", "load_encoder(3, (4, 4))", "encoder|3"),
    ("python", "load_encoder('digits', 4)", "grid_size"),
    ("python", "load_encoder('digits', (0, 4))", "grid_size"),
    ("python", "AlignedTransformer(3, [1], [load_encoder('digits', (4, 4))])", "transformer|blocks"),
    (
        "python",
        "AlignedTransformer(SiTTransformer2DModel(sample_size=8, num_layers=2), [1], [3])",
        "encoders|embed_dim",
    ),
    ("python", "sit_preset(3)", "3|preset"),
    ("python", "TokenReward('a', 3)", "reward|function|callable"),
    ("python", "SiTTransformer2DModel(sample_size=8, num_layers=-1)", "num_layers"),
    ("python", "SiTTransformer2DModel(prediction_type='x')", "prediction_type"),
    ("python", "SiTTransformer2DModel.from_pretrained('nowhere')", "nowhere"),
    ("python", "SiTSDEScheduler(num_train_timesteps='a')", "num_train_timesteps"),
    ("python", "compare.fid(3, 'flat', encoder='encoder')", "samples"),
    ("python", "compare.fid('flat', 3, encoder='encoder')", "reference"),
    ("python", "metrics.kernel_distance(torch.rand(9, 3), torch.rand(9, 4), 2, 3)", "4|dim|feature"),
    (
        "python",
        "metrics.frechet_distance(torch.zeros(3), torch.full((3, 3), nan), torch.zeros(3), torch.eye(3))",
        "finite|covariance",
    ),
    ("python", "load_training_data(VRPOConfig(dataset_name='digits', max_train_samples=0))", "max_train_samples"),
]

# These should work with a warning: the output must match the expression.
PLAN = [
    ("--gpu no-such", "gpu"),
    ("--mfu 2", "mfu"),
    ("--mfu 0", "mfu"),
    ("--memory_reserve -1", "memory_reserve"),
    ("--preset SiT-Z/2", "preset"),
    ("~--vae", "vae"),
    ("--objective vrpo", "encoder"),
    ("--objective repa --encoder nowhere", "encoder"),
    ("--json nowhere/plan.json", "json|nowhere"),
]
FID = [
    ("nowhere", "nowhere"),
    ("~--reference", "reference"),
    ("--reference nowhere", "reference|nowhere"),
    ("--encoder nowhere", "encoder"),
    ("--sampler no-such", "sampler"),
    ("--guidance_scale a", "guidance_scale"),
]
APP = [
    ("--dtype float7", "dtype"),
    ("--server_port a", "server_port"),
    ("--server_port 2.5", "server_port"),
]

WARNED = [
    ("train", "--dataset_name table_gaps", "class|label"),
    (
        "train",
        "~--dataset_name --train_data_dir words",
        "split|class|image",
        "words/train_station = images/cat",
        "words/bullet_train = images/dog",
    ),
    (
        "train",
        "~--dataset_name --train_data_dir hidden",
        "hidden|image|read",
        "hidden = images",
        "hidden/cat/notes.docx = bad/garbage",
    ),
    ("train", "--dataset_name digits", "embedded|digits"),
    ("evaluate", "--metrics kid", "few|image|count"),
    ("evaluate", "flat", "not used: .*docx", "flat/x.docx = bad/garbage"),
    ("evaluate", "flat", "not used: 1 link to no file", "flat/0.png |"),
    ("evaluate", "flat", "not used: 1 link to no file", "flat/0.png -> /dev/zero"),
    ("report", "", "damaged|skipped|line", "run/metrics.jsonl = bad/metrics"),
]

TABLES = {
    "train": TRAIN,
    "prepare": PREPARE,
    "sample": SAMPLE,
    "evaluate": EVALUATE,
    "probe": PROBE,
    "layers": LAYERS,
    "convert": CONVERT,
    "plan": PLAN,
    "fid": FID,
    "app": APP,
    "push": PUSH,
    "report": REPORT,
    "latents verify": LATENTS_VERIFY,
    "latents export": LATENTS_EXPORT,
    "latents import": LATENTS_IMPORT,
    "python": PYTHON,
}


def wrong_values() -> Iterator[Case]:
    """A wrong value for each numeric option of each command, taken from the tables in turn."""
    for table, values in ((WHOLE, WRONG_WHOLE), (NUMBERS, WRONG_NUMBER)):
        for command, names in table.items():
            for i, name in enumerate(names.split()):
                value = values[i % len(values)]
                # These can be negative.
                if value.startswith("-") and name in ("encoder_layer", "reward_shallow_layer", "target"):
                    value = "a"
                yield Case(command, f"--{name}={value}", f"--{name}", item="values")


def all_cases() -> list[Case]:
    """All cases, those of the tables and `wrong_values`."""
    cases = [
        Case(command, changes, names, tuple(given), item="files" if given else "options")
        for command, table in TABLES.items()
        for changes, names, *given in table
    ]
    cases += [
        Case(command, changes, names, tuple(given), item="files" if given else "options")
        for command, changes, names, *given in MORE
    ]
    warned = [
        Case(command, changes, names, tuple(given), "warned", "warnings", True)
        for command, changes, names, *given in WARNED
    ]
    return [*cases, *wrong_values(), *warned]
