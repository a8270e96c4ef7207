# ruff: noqa: C408  # mmengine's configs are written with dict()
# mmengine gives `_base_` another meaning than mypy sees:
# mypy: ignore-errors
# The same with self-training: lines like these make any config of MMSegmentation 1.x learn from unlabelled target images too.
_base_ = ["source_only.py"]
custom_imports = dict(imports=["dacal_addon.integrations.mmengine"], allow_failed_imports=False)
short = dict(threshold=0.9, teacher=dict(type="MomentumAnnealingEMA", momentum=0.03, gamma=1))  # long trainings: the defaults
model = dict(type="DACalEncoderDecoder", dacal=short)
target = dict(_base_.source, data_prefix=dict(img_path="target/images"), pipeline=_base_.unlabelled_pipeline)
train_dataloader = dict(dataset=dict(_delete_=True, type="SourceAndTarget", source=_base_.source, target=target))
val_evaluator = [dict(type="IoUMetric", iou_metrics=["mIoU"]), dict(type="CalibrationMetric")]
test_evaluator = val_evaluator

# After training: one temperature, found on source images that training does not see, in a copy of the student.
custom_hooks = [dict(type="DACalHook", calibrate=dict(source=_base_.held_out, target=target))]
