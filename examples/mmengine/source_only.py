# ruff: noqa: C408  # mmengine's configs are written with dict()
# mypy sees no common type in a config's values:
# mypy: ignore-errors
# A plain config of MMSegmentation 1.x, of which the other one is made: a small network with an auxiliary head on tiny images.
default_scope = "mmseg"
data_root = "tiny"  # train_on_cpu.py writes it
metainfo = dict(classes=("background", "mitochondrion"), palette=[[40, 40, 40], [230, 160, 60]])
crop_size = (48, 48)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations"),
    dict(type="RandomCrop", crop_size=crop_size),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackSegInputs"),
]
unlabelled_pipeline = [step for step in train_pipeline if step["type"] != "LoadAnnotations"]
test_pipeline = [dict(type="LoadImageFromFile"), dict(type="LoadAnnotations"), dict(type="PackSegInputs")]
source = dict(
    type="BaseSegDataset",
    metainfo=metainfo,
    data_root=data_root,
    img_suffix=".png",
    seg_map_suffix=".png",
    data_prefix=dict(img_path="source/images", seg_map_path="source/labels"),
    pipeline=train_pipeline,
)
held_out = dict(
    source,
    data_prefix=dict(img_path="held_out/images", seg_map_path="held_out/labels"),
    pipeline=test_pipeline,
)
train_dataloader = dict(batch_size=4, num_workers=0, sampler=dict(type="InfiniteSampler", shuffle=True), dataset=source)
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(
        type="BaseSegDataset",
        metainfo=metainfo,
        data_root=data_root,
        img_suffix=".png",
        seg_map_suffix=".png",
        data_prefix=dict(img_path="target_test/images", seg_map_path="target_test/labels"),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = [dict(type="IoUMetric", iou_metrics=["mIoU"])]
test_evaluator = val_evaluator

norm_cfg = dict(type="BN")
head = dict(
    type="FCNHead",
    num_convs=1,
    concat_input=False,
    num_classes=2,
    norm_cfg=norm_cfg,
    align_corners=False,
    loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True),
)
model = dict(
    type="EncoderDecoder",
    data_preprocessor=dict(
        type="SegDataPreProcessor",
        mean=[127.5] * 3,
        std=[64.0] * 3,
        bgr_to_rgb=True,
        size=crop_size,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(
        type="UNet",
        base_channels=8,
        num_stages=4,
        strides=(1, 1, 1, 1),
        enc_num_convs=(2, 2, 2, 2),
        dec_num_convs=(1, 1, 1),
        downsamples=(True, True, True),
        enc_dilations=(1, 1, 1, 1),
        dec_dilations=(1, 1, 1),
        norm_cfg=norm_cfg,
    ),
    decode_head=dict(**head, in_channels=8, in_index=3, channels=16),
    auxiliary_head=dict(
        type="FCNHead",
        in_channels=16,
        in_index=2,
        channels=16,
        num_convs=1,
        concat_input=False,
        num_classes=2,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(type="CrossEntropyLoss", avg_non_ignore=True, loss_weight=0.4),
    ),
    train_cfg=dict(),
    test_cfg=dict(mode="whole"),
)

optim_wrapper = dict(type="OptimWrapper", optimizer=dict(type="AdamW", lr=5e-3, weight_decay=0.01))
param_scheduler = [dict(type="LinearLR", start_factor=1.0, end_factor=0.0, begin=0, end=300, by_epoch=False)]
train_cfg = dict(type="IterBasedTrainLoop", max_iters=300, val_interval=300)
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
default_hooks = dict(
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    checkpoint=dict(type="CheckpointHook", by_epoch=False, interval=100, max_keep_ckpts=1),
)
log_processor = dict(by_epoch=False)
randomness = dict(seed=0)
