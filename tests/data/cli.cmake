# The test of moe-data's command line runs the program.
if(TARGET test_data_cli AND TARGET moe-data)
  add_dependencies(test_data_cli moe-data)
endif()
